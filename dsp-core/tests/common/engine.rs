//! The engine that a test binary runs on: processes, if MPI started it (`mpirun -n 4 <binary>
//! --test-threads=1`), else threads. The tests are the same.
//!
//! All processes run the same tests in the same order, and each sees what all ranks returned, so that they
//! agree on what fails. A launch of more ranks than there are processes runs on threads.

use dsp_core::launch::BoxError;
use dsp_core::{Engine, Group, Launch, LaunchError};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// The engine for a launch of `ranks` ranks.
#[cfg(feature = "mpi")]
pub(crate) fn engine(ranks: usize) -> Engine {
    use std::sync::OnceLock;

    use dsp_core::transport::mpi::Mpi;

    static MPI: OnceLock<Option<Mpi>> = OnceLock::new();
    let started = || {
        let by_mpirun = std::env::var_os("OMPI_COMM_WORLD_SIZE").is_some();
        by_mpirun.then(|| Mpi::start().unwrap())
    };
    match MPI.get_or_init(started) {
        Some(mpi) if ranks <= mpi.size() => Engine::Mpi(mpi.clone()),
        _ => Engine::Threads,
    }
}

/// The engine for a launch of `ranks` ranks.
#[cfg(not(feature = "mpi"))]
pub(crate) fn engine(_ranks: usize) -> Engine {
    Engine::Threads
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
