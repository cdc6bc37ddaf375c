//! What a process's mover does: the one thing of this transport that only GPUs can do, behind a trait, so that all the
//! rest is tested without one.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::NcclError;
use super::communicator::Boxes;

/// Moves boxes between the ranks' devices. One thread calls it, in the hub's order.
pub(super) trait Mover {
    /// A new name under which movers can join each other, good for one time.
    fn name(&mut self) -> Result<Vec<u8>, NcclError>;

    /// Joins the movers of all processes, which do the same.
    fn join(&mut self, name: &[u8], patience: &Patience<'_>) -> Result<(), NcclError>;

    /// Whether it has joined them, and nothing has failed since.
    fn joined(&self) -> bool;

    /// Sends and receives; all has arrived when it returns. The members of an exchange all call it.
    fn exchange(&mut self, boxes: &Boxes, patience: &Patience<'_>) -> Result<(), NcclError>;

    /// Ends what is under way, here at once, and with an error at the others.
    fn abort(&mut self);

    /// Leaves the others in peace, who do the same.
    fn leave(&mut self, patience: &Patience<'_>) -> Result<(), NcclError>;
}

/// What ends a mover's waits in a launch. It comes with what the mover is asked for: by the time that is done the launch
/// may have ended here, and the others' movers wait for this one all the same.
#[derive(Debug, Clone, Default)]
pub(super) struct Limits {
    /// How long each may take.
    pub(super) timeout: Duration,
    /// Whether the launch has failed.
    pub(super) failed: Arc<AtomicBool>,
}

impl Limits {
    pub(super) fn failed(&self) -> bool {
        self.failed.load(Ordering::Acquire)
    }

    /// For what begins now.
    pub(super) fn patience(&self) -> Patience<'_> {
        Patience {
            start: Instant::now(),
            limits: self,
        }
    }
}

/// How long something is waited for: until the time is over, and not when the launch has failed.
#[derive(Debug)]
pub(super) struct Patience<'a> {
    start: Instant,
    limits: &'a Limits,
}

/// Between two looks at what has become of a call, after the first: well below what a launch costs.
const PAUSE: Duration = Duration::from_micros(20);

/// For how long nobody sleeps between two looks.
const WAKEFUL: Duration = Duration::from_millis(1);

impl Patience<'_> {
    /// Waits a moment for something.
    ///
    /// # Errors
    /// [`NcclError::Aborted`] or [`NcclError::Late`] if it is not worth waiting any longer.
    pub(super) fn pause(&self, what: &'static str) -> Result<(), NcclError> {
        if self.limits.failed() {
            return Err(NcclError::Aborted);
        }
        let waited = self.start.elapsed();
        if waited >= self.limits.timeout {
            return Err(NcclError::Late { what, waited });
        }
        match waited < WAKEFUL {
            true => std::thread::yield_now(),
            false => std::thread::sleep(PAUSE),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patience_ends_at_the_deadline_or_when_the_launch_fails() {
        let limits = |timeout| Limits {
            timeout,
            ..Limits::default()
        };
        let short = limits(Duration::from_millis(3));
        let patience = short.patience();
        let error = loop {
            if let Err(error) = patience.pause("for nobody") {
                break error;
            }
        };
        assert!(
            matches!(
                error,
                NcclError::Late {
                    what: "for nobody",
                    ..
                }
            ),
            "{error}"
        );
        let endless = limits(Duration::MAX);
        let patience = endless.patience();
        assert!(patience.pause("for somebody").is_ok());
        endless.failed.store(true, Ordering::Release);
        let error = patience.pause("for somebody").unwrap_err();
        assert!(matches!(error, NcclError::Aborted), "{error}");
    }
}
