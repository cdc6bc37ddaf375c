//! The engine that a test binary runs on: processes, if MPI started it (`mpirun -n 4 <binary>
//! --test-threads=1`) or it was told its place among others by RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT
//! (NCCL, on the GPU of the local rank), else threads. The tests are the same.
//!
//! All processes run the same tests in the same order, and each sees what all ranks returned, so that they
//! agree on what fails. A launch of more ranks than there are processes runs on threads.

use std::sync::OnceLock;

use dsp_core::launch::BoxError;
use dsp_core::{Engine, Group, Launch, LaunchError};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// The engine for a launch of `ranks` ranks.
pub(crate) fn engine(ranks: usize) -> Engine {
    static ENGINE: OnceLock<Option<Engine>> = OnceLock::new();
    let of_processes = ENGINE.get_or_init(|| mpi().or_else(nccl)).as_ref();
    match of_processes {
        Some(engine) if ranks <= processes(engine) => engine.clone(),
        _ => Engine::Threads,
    }
}

fn processes(engine: &Engine) -> usize {
    match engine {
        Engine::Threads => 1,
        #[cfg(feature = "mpi")]
        Engine::Mpi(mpi) => mpi.size(),
        #[cfg(feature = "nccl")]
        Engine::Nccl(nccl) => nccl.size(),
    }
}

/// MPI, if it started this process.
#[cfg(feature = "mpi")]
fn mpi() -> Option<Engine> {
    let by_mpirun = std::env::var_os("OMPI_COMM_WORLD_SIZE").is_some();
    by_mpirun.then(|| Engine::Mpi(dsp_core::transport::mpi::Mpi::start().unwrap()))
}

#[cfg(not(feature = "mpi"))]
fn mpi() -> Option<Engine> {
    None
}

/// NCCL, if this process was told its place among others as a launcher tells it.
#[cfg(feature = "nccl")]
fn nccl() -> Option<Engine> {
    use dsp_core::transport::nccl::NcclConfig;

    let number = |name: &str| std::env::var(name).ok()?.parse::<usize>().ok();
    let (rank, size) = (number("RANK")?, number("WORLD_SIZE")?);
    let address = std::env::var("MASTER_ADDR").ok()?;
    let address = format!("{address}:{}", number("MASTER_PORT")?);
    let config = NcclConfig::new(rank, size, address).with_device(number("LOCAL_RANK")?);
    Some(Engine::Nccl(config.start().unwrap()))
}

#[cfg(not(feature = "nccl"))]
fn nccl() -> Option<Engine> {
    None
}

/// [`dsp_core::launch()`] on [`engine`]; every process gets what all ranks return.
pub(crate) fn launch<T, E, F>(ranks: usize, function: F) -> Result<Vec<T>, LaunchError>
where
    T: Serialize + DeserializeOwned + Send + Sync + 'static,
    E: Into<BoxError>,
    F: Fn(Group) -> Result<T, E> + Send + Sync + 'static,
{
    Launch::new(ranks).on(&engine(ranks)).run_shared(function)
}
