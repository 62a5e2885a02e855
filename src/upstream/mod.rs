//! What next: the plan of attempts, and what may go wrong with one.

pub mod failure;
pub mod plan;

pub use failure::{Failure, Stop};
pub use plan::{Attempt, Exhausted, Outcome, Plan, Sent, Try, Verdict};
