//! The engine that a command's ranks run on, by the name of its transport.

use dsp_bench::launcher::TransportKind;
#[cfg(feature = "nccl")]
use dsp_bench::launcher::{Environment, Place};
use dsp_core::Engine;
#[cfg(feature = "nccl")]
use dsp_core::transport::nccl::NcclConfig;

/// Starts it.
pub(crate) fn start(transport: TransportKind) -> anyhow::Result<Engine> {
    match transport {
        TransportKind::Local => Ok(Engine::Threads),
        #[cfg(feature = "mpi")]
        TransportKind::Mpi => Ok(Engine::Mpi(dsp_core::transport::mpi::Mpi::start()?)),
        #[cfg(not(feature = "mpi"))]
        TransportKind::Mpi => anyhow::bail!(
            "--transport mpi: this program was built without it; build it with --features mpi"
        ),
        #[cfg(feature = "nccl")]
        TransportKind::Nccl => nccl(&Environment::new(std::env::vars_os())),
        #[cfg(not(feature = "nccl"))]
        TransportKind::Nccl => anyhow::bail!(
            "--transport nccl: this program was built without it; build it with --features nccl"
        ),
    }
}

/// This process of an NCCL job, on the GPU of its number on its machine.
#[cfg(feature = "nccl")]
fn nccl(environment: &Environment) -> anyhow::Result<Engine> {
    let place = environment.own_place().unwrap_or(Place::ALONE);
    let address = match environment.meeting(place) {
        Some(address) => address,
        None => anyhow::bail!(
            "--transport nccl: rank {} of {} does not know where rank 0 is; say it by MASTER_ADDR and MASTER_PORT, or \
             start the ranks by dsp launch",
            place.rank,
            place.size
        ),
    };
    let config = NcclConfig::new(place.rank, place.size, address).with_device(place.local);
    Ok(Engine::Nccl(config.start()?))
}

/// Whether this process holds rank 0 of every launch, and so is the one that shows and writes.
pub(crate) fn shows(engine: &Engine) -> bool {
    engine.held(1).contains(&0)
}
