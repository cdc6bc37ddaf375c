//! Sequence-parallel strategies: one file and one feature each, sharing nothing but `dsp-core`.
//!
//! A strategy is a value. [`all`] lists those that are compiled in; [`by_name`] finds one; or name the type:
//!
//! ```
//! use std::sync::Arc;
//! use dsp_core::SequenceParallel;
//!
//! # #[cfg(all(feature = "dsp", feature = "ulysses"))] {
//! let swapped_by_a_value: Arc<dyn SequenceParallel> = if cfg!(debug_assertions) {
//!     Arc::new(dsp_strategies::Dsp)
//! } else {
//!     Arc::new(dsp_strategies::Ulysses)
//! };
//! # let _ = swapped_by_a_value;
//! # }
//! ```
//!
//! [`Mixture`] shares a model's stages among several. A new strategy is one new file, and its line in the list
//! below.

use std::sync::Arc;

use dsp_core::SequenceParallel;

/// Declares each strategy's module and type, and registers it.
macro_rules! strategies {
    ($($(#[$feature:meta])* $module:ident :: $strategy:ident,)*) => {
        $($(#[$feature])* mod $module; $(#[$feature])* pub use $module::$strategy;)*

        /// Every strategy that is compiled in, serial first.
        pub fn all() -> Vec<Arc<dyn SequenceParallel>> {
            vec![$($(#[$feature])* Arc::new($strategy::default()),)*]
        }
    };
}

strategies! {
    serial::Serial,
    #[cfg(feature = "dsp")] dsp::Dsp,
    #[cfg(feature = "ulysses")] ulysses::Ulysses,
    #[cfg(feature = "ring")] ring::Ring,
    #[cfg(feature = "usp")] usp::Usp,
    #[cfg(feature = "megatron")] megatron::Megatron,
    #[cfg(feature = "lss")] lss::Lss,
    #[cfg(feature = "lasp")] lasp::Lasp,
    #[cfg(feature = "lasp2")] lasp2::Lasp2,
}

mod mixture;

pub use mixture::Mixture;

/// A name that no compiled-in strategy has.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "no strategy is called {name:?}; compiled in are: {}; a mixture joins some of them by +", known.join(", ")
)]
pub struct UnknownStrategy {
    /// The name.
    pub name: String,
    /// The names that there are.
    pub known: Vec<String>,
}

/// The strategy of that name, or the [`Mixture`] of several names joined by `+`, the first choice first.
///
/// # Errors
/// [`UnknownStrategy`] with the names that there are.
pub fn by_name(name: &str) -> Result<Arc<dyn SequenceParallel>, UnknownStrategy> {
    let strategies = all();
    let part = |name: &str| {
        let found = strategies.iter().find(|strategy| strategy.name() == name);
        found.cloned().ok_or_else(|| UnknownStrategy {
            name: name.to_owned(),
            known: strategies
                .iter()
                .map(|strategy| strategy.name().to_owned())
                .collect(),
        })
    };
    match name.split_once('+') {
        None => part(name),
        Some((first, others)) => {
            let first = part(first)?;
            let others: Vec<_> = others.split('+').map(part).collect::<Result<_, _>>()?;
            Ok(Arc::new(Mixture::new(first, others)))
        }
    }
}
