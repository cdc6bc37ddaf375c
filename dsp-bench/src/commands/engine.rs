//! The engine that a command's ranks run on, by the name of its transport.

use dsp_bench::launcher::TransportKind;
use dsp_core::Engine;

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
    }
}

/// Whether this process holds rank 0 of every launch, and so is the one that shows and writes.
pub(crate) fn shows(engine: &Engine) -> bool {
    engine.held(1).contains(&0)
}

/// The most ranks that a launch can have.
pub(crate) fn most_ranks(engine: &Engine) -> usize {
    match engine {
        Engine::Threads => usize::MAX,
        #[cfg(feature = "mpi")]
        Engine::Mpi(mpi) => mpi.size(),
    }
}
