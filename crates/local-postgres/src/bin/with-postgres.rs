//! Runs a command with `DATABASE_URL` set to an empty private database that ends with it.

use std::process::{Command, ExitCode};

use holdfast_local_postgres::TemporaryPostgres;

fn main() -> Result<ExitCode, Box<dyn std::error::Error>> {
    let mut arguments = std::env::args_os().skip(1);
    let program = arguments.next().ok_or("usage: with-postgres PROGRAM [ARGUMENT]…")?;
    let postgres = TemporaryPostgres::start()?;
    let status = Command::new(program).args(arguments).env("DATABASE_URL", postgres.url()).status();
    drop(postgres);
    let code = status?.code().and_then(|code| u8::try_from(code).ok());
    Ok(ExitCode::from(code.unwrap_or(1)))
}
