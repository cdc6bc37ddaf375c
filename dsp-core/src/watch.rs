//! What a session looks for in the activations, beside their layouts: numbers that are none.

use burn::tensor::Tensor;
use serde::{Deserialize, Serialize};

use crate::blocks::DIMS;
use crate::error::{CommError, Error};
use crate::group::Group;
use crate::layout::Shard;
use crate::ledger::Phase;
use crate::vjp;

/// What a session looks at, beside the layouts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Watch {
    /// Nothing.
    #[default]
    Nothing,
    /// Whether what a verb takes is finite, and the gradient of what it gives, each before anything of it is sent:
    /// the rank and the stage where a NaN or an infinity arose are then named. Reads all activations once more each
    /// way.
    Finite,
}

/// A look at what goes into a verb forward and comes into it backward: what the verb may send is seen first, so that
/// nobody is named who was only sent it.
#[derive(Debug, Clone)]
pub(crate) struct Lookout<'a> {
    pub(crate) watch: Watch,
    pub(crate) group: &'a Group,
    pub(crate) stage: &'a str,
    pub(crate) verb: &'static str,
}

impl Lookout<'_> {
    /// Looks at what the verb takes.
    ///
    /// # Errors
    /// [`CommError::NotFinite`], with which the group fails.
    pub(crate) fn takes(&self, x: &Shard) -> Result<(), CommError> {
        match self.watch {
            Watch::Nothing => Ok(()),
            Watch::Finite => look(
                &x.tensor().clone().inner(),
                self.group,
                self.stage,
                self.verb,
                Phase::Forward,
            ),
        }
    }

    /// What the verb gives, whose gradient is looked at before it goes back through the verb.
    pub(crate) fn gives(&self, y: Shard) -> Result<Shard, Error> {
        if self.watch == Watch::Nothing {
            return Ok(y);
        }
        let (group, stage, verb) = (self.group.clone(), self.stage.to_owned(), self.verb);
        Ok(y.map(|y| {
            let same = y.clone().inner();
            vjp::attach1(y, same, move |gradient| {
                look(&gradient, &group, &stage, verb, Phase::Backward)?;
                Ok::<_, CommError>(gradient)
            })
        })?)
    }
}

fn look(
    x: &Tensor<DIMS>,
    group: &Group,
    stage: &str,
    verb: &'static str,
    pass: Phase,
) -> Result<(), CommError> {
    // No tensor without elements has one that is not; Burn has no `all` of none.
    if x.shape().num_elements() == 0 || x.clone().is_finite().all().into_scalar::<bool>() {
        return Ok(());
    }
    let cause = CommError::NotFinite {
        rank: group.rank(),
        stage: stage.to_owned(),
        verb: verb.into(),
        pass,
    };
    group.abort(cause.clone());
    Err(cause)
}
