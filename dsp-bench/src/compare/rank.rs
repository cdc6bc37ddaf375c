//! What every rank of a case does: the run that is held to serial, and a run that is timed.

use std::num::NonZeroUsize;
use std::sync::{Arc, mpsc};
use std::time::Instant;

use burn::tensor::{DType, Device, Tensor, TensorData};
use dsp_core::collective::all_reduce_in;
use dsp_core::ledger::{Phase, Traffic as LedgerReading};
use dsp_core::{Group, SequenceParallel, Session};
use dsp_models::training::Reduce;
use serde::{Deserialize, Serialize};

use crate::devices::Devices;
use crate::record::{Difference, Equality};
use crate::scenario::Passes;
use crate::subject::{Gradients, OnRank, Pass, Run, StepGradients, Subject, SubjectError};

/// What the ranks of a case run, and how.
#[derive(Clone)]
pub(super) struct Steps {
    pub(super) subject: Arc<dyn Subject>,
    pub(super) strategy: Arc<dyn SequenceParallel>,
    /// The model's kind, for the trace.
    pub(super) model: &'static str,
    pub(super) devices: Devices,
    pub(super) dtype: DType,
    pub(super) passes: Passes,
    pub(super) reduce: Reduce,
    pub(super) switch_parts: NonZeroUsize,
}

/// One rank's timed run.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct RankRun {
    /// Wall-clock seconds.
    pub(super) seconds: f64,
    /// What its ledger counted.
    pub(super) reading: LedgerReading,
    /// Bytes by formula: forward, backward, parameters' gradients.
    pub(super) formula: [u64; 3],
}

impl Steps {
    /// The run that is held to serial: rank 0 hands over what it gave, whole, and its seconds. It is the same on all
    /// ranks.
    pub(super) fn checked(
        &self,
        group: Group,
        whole: &mpsc::Sender<(Outputs, f64)>,
    ) -> Result<(), SubjectError> {
        let (session, pass) = self.session(group)?;
        let subject = self.subject.on_rank(&session, pass.clone())?;
        let start = Instant::now();
        let (run, gradients) = self.pass(&*subject, &pass.device)?;
        let seconds = start.elapsed().as_secs_f64();
        let output = subject.output(&run)?;
        let gradients = gradients.map(|gradients| subject.whole(gradients));
        let gradients = gradients.transpose()?;
        if session.group().rank() == 0 {
            // Whoever does not listen any more has given the case up.
            let _ = whole.send((Outputs { output, gradients }, seconds));
        }
        Ok(())
    }

    /// A run that is timed, after `warm_ups` that are not.
    pub(super) fn timed(
        &self,
        group: Group,
        round: usize,
        warm_ups: usize,
    ) -> Result<RankRun, SubjectError> {
        let (session, pass) = self.session(group)?;
        let subject = self.subject.on_rank(&session, pass.clone())?;
        for _ in 0..warm_ups {
            self.pass(&*subject, &pass.device)?;
        }
        // Everybody waits for everybody, so that no rank's start is another's waiting.
        let token = Tensor::<1>::zeros([1], (&pass.device, self.dtype));
        all_reduce_in(token, Phase::Outside, session.group())?;
        session.group().ledger().take();
        let (model, strategy) = (self.model, self.strategy.name());
        let _span = tracing::info_span!("step", model, strategy, round).entered();
        let start = Instant::now();
        drop(self.pass(&*subject, &pass.device)?);
        let seconds = start.elapsed().as_secs_f64();
        let reading = session.group().ledger().take();

        let sends = session.expected_sends();
        let (backward, parameters) = match self.passes {
            Passes::Forward => (0, 0),
            Passes::ForwardBackward => (sends.backward, subject.expected_reduce()),
        };
        let width = self.dtype.size() as u64;
        Ok(RankRun {
            seconds,
            reading,
            formula: [sends.forward, backward, parameters].map(|elements| elements * width),
        })
    }

    fn session(&self, group: Group) -> Result<(Session, Pass), SubjectError> {
        let session = Session::new(self.strategy.clone(), group, self.subject.shape())?
            .switching_in(self.switch_parts);
        let pass = Pass {
            device: self.devices.of_rank(session.group().rank()),
            dtype: self.dtype,
            passes: self.passes,
            reduce: self.reduce,
        };
        Ok((session, pass))
    }

    fn pass(
        &self,
        subject: &dyn OnRank,
        device: &Device,
    ) -> Result<(Run, Option<StepGradients>), SubjectError> {
        let run = subject.forward()?;
        let gradients = match self.passes {
            Passes::Forward => None,
            Passes::ForwardBackward => Some(subject.backward(&run)?),
        };
        finish(device)?;
        Ok((run, gradients))
    }
}

/// Waits until a device has done all that it was told: GPUs work behind.
fn finish(device: &Device) -> Result<(), SubjectError> {
    let done = device.sync();
    done.map_err(|error| SubjectError::Device(error.to_string()))
}

/// What a run gave, whole.
pub(super) struct Outputs {
    output: TensorData,
    gradients: Option<Gradients>,
}

impl Outputs {
    pub(super) fn equality(&self, reference: &Self, tolerance: f64) -> Equality {
        let gradients = self.gradients.as_ref().zip(reference.gradients.as_ref());
        Equality {
            tolerance,
            output: difference("output", &reference.output, &self.output),
            input_gradient: gradients.and_then(|(own, serial)| {
                let serial = serial.input.as_ref()?;
                let missing = none();
                let own = own.input.as_ref().unwrap_or(&missing);
                Some(difference("input", serial, own))
            }),
            parameter_gradients: gradients.and_then(|(own, serial)| {
                let missing = none();
                let each = |(name, serial): (&String, &TensorData)| {
                    difference(name, serial, own.parameters.get(name).unwrap_or(&missing))
                };
                serial.parameters.iter().map(each).reduce(Difference::worst)
            }),
        }
    }
}

/// What equals no tensor.
fn none() -> TensorData {
    TensorData::new(Vec::<f32>::new(), [0])
}

fn difference(name: &str, reference: &TensorData, actual: &TensorData) -> Difference {
    let doubles = |data: &TensorData| data.iter::<f64>().collect::<Vec<f64>>();
    match (reference.as_slice::<f32>(), actual.as_slice::<f32>()) {
        (Ok(reference), Ok(actual)) => Difference::between(name, reference, actual),
        _ => Difference::between(name, &doubles(reference), &doubles(actual)),
    }
}
