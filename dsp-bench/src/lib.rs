//! Strategies head to head on real data, and checked against reference files: the library behind `dsp`.
//!
//! | module | what it is |
//! |---|---|
//! | [`scenario`], [`clip`] | what is compared, from a TOML file; the video that a model may run on |
//! | [`text`] | text, a token a byte |
//! | [`fields`] | real weather: variables over time, latitude and longitude from a NetCDF file |
//! | [`subject`] | the models that it may run, each with its sizes and input, and one step of them |
//! | [`devices`] | where the ranks compute |
//! | [`compare`] | runs every strategy on every number of ranks: equality first, then times |
//! | [`record`] | what was found: the one source of [`table`], JSON and [`report`] |
//! | [`train`] | models learn from real data, with checkpoints |
//! | [`launcher`] | starts a job's ranks, shows what they say, ends them together |
//! | [`reference`](mod@reference), [`verify`] | tensors made by other people's code, and the comparison with them |
//! | [`progress`], [`tracefile`], [`allocator`] | what runs now; a Perfetto trace; the memory that is held |

pub mod allocator;
pub mod clip;
pub mod compare;
pub mod devices;
pub mod fields;
mod finding;
pub mod launcher;
pub mod progress;
pub mod record;
pub mod reference;
pub mod report;
pub mod scenario;
pub mod subject;
pub mod table;
pub mod text;
pub mod tracefile;
pub mod train;
pub mod verify;
