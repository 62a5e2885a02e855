//! Parses the command line, calls the library, and turns the result into an exit code.

use std::process::ExitCode;

use portolan::cli::{self, Exit};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    match cli::main() {
        Ok(exit) => exit.into(),
        Err(error) => {
            eprintln!("error: {error:#}");
            Exit::Ours.into()
        }
    }
}
