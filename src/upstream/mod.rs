//! What next: the plan of attempts, and what may go wrong with one.

mod choice;
pub mod failure;
pub mod plan;
pub mod replay;

pub use failure::{Failure, Stop};
pub use plan::{Attempt, Backends, Exhausted, Outcome, Plan, Sent, Start, Try, Verdict};
