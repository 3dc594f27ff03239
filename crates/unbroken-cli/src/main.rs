//! The `unbroken` program: hands the process's arguments and streams to the library.

use std::io;
use std::process::ExitCode;

fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args_os().collect();
    let code = unbroken_cli::run(&arguments, &mut io::stdout().lock(), &mut io::stderr());
    ExitCode::from(u8::try_from(code).unwrap_or(2))
}
