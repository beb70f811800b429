//! `bench-safety-framed`: reads a tenant's rows, an empty line, and alignment rows; writes these as a worker has them trained with.

use std::io::{Read, Write};

use anyhow::Context;
use holdfast_dataset::frames;

fn main() -> anyhow::Result<()> {
    let mut text = String::new();
    std::io::stdin().read_to_string(&mut text)?;
    let (tenants, alignment) = text.split_once("\n\n").context("expected rows, an empty line, and alignment rows")?;
    let frames = frames::of_file(tenants.as_bytes())?;
    Ok(std::io::stdout().write_all(&frames::framed(alignment.as_bytes(), &frames)?)?)
}
