//! What next: the plan of attempts, and what may go wrong with one.

pub mod attempt;
mod choice;
pub mod failure;
pub mod plan;
pub mod replay;

pub use attempt::{Attempt, Exhausted, Outcome, Sent, Try, Verdict};
pub use failure::{Failure, Stop};
pub use plan::{Backends, Plan, Start};
