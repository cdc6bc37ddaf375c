//! An axial transformer over time, latitude and longitude, on shards: from weather fields to the next ones.
//!
//! ```text
//!   fields [B, T, lat, lon, variables]        times t − T + 1 … t, at every point of a grid
//!     │ split                                 every rank holds the fields and keeps its own points
//!     ▼
//!   linear + point on the sphere + season
//!     │
//!     ▼   depth times
//!   attention over T (causal) · attention over lat · attention over lon · MLP      each: x + f(norm(x))
//!     │
//!     ▼
//!   norm ─ linear ─► [B, T, lat, lon, variables]      at time t: what the fields are at t + 1
//! ```
//!
//! All three sequence axes of an activation are in use, and each is attended over once a layer. Axial attention:
//! Ho et al., arXiv:1912.12180. Attention over time turns queries and keys by their time's position; what is
//! north or east of a point follows from the points' places on the sphere.
//!
//! | file | what it is |
//! |---|---|
//! | config | sizes, and the stages that the model declares |
//! | grid | where and when the fields are: places on the sphere, seasons, areas |
//! | layer | attention over an axis, a layer |
//! | loss | the area-weighted loss of the next fields |
//! | model | the whole |
//! | roles | which parameters a strategy may shard |

mod config;
mod grid;
mod layer;
mod loss;
mod model;
mod roles;

pub use config::{LATITUDE, LONGITUDE, TIME, TimeMask, WeatherConfig};
pub use grid::{Grid, GridError};
pub use layer::{Axial, Layer};
pub use loss::{WeatherBatch, loss};
pub use model::Weather;
pub use roles::roles;
