//! A file of 2 GiB through `POST /v1/files`, and in 32 parts at the same time, beside the same bytes through a copy that hashes them.

use std::fs::File;
use std::io::{BufWriter, Read, Write};
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use anyhow::Result;
use sha2::{Digest, Sha256};

use super::{Figure, Wanted, median};
use crate::service::Service;
use crate::setup::{self, Libtorch};
use crate::shell;

const BYTES: usize = 2 << 30;
const PARTS: u64 = 32;
/// Turns of one file and of parts, each beside copies; the median counts.
const TURNS: usize = 3;
/// Throughput over that of the copy that is asked for.
const BAR: f64 = 0.5;

pub(super) fn run(_: &Wanted<'_>, figures: &mut Vec<Figure>) -> Result<()> {
    setup::run(Libtorch::Cpu)?;
    let programs = shell::build_release()?;
    let folder = shell::target().join("bench-upload");
    let data = folder.join("data");
    std::fs::create_dir_all(&data)?;
    let file = folder.join("rows.jsonl");
    write_rows(&file)?;
    let service = Service::start(&programs.join("holdfast"), &data)?;
    let idle = service.peak_memory_mib()?;
    let timed = |upload: &dyn Fn() -> Result<()>| -> Result<f64> {
        // What was written before must not be written out meanwhile.
        shell::run(&mut Command::new("sync"))?;
        let since = Instant::now();
        upload()?;
        Ok(since.elapsed().as_secs_f64())
    };
    let copy = || timed(&|| copy_and_hash(&file, &folder.join("copy")));
    let (mut wholes, mut parts) = (Vec::new(), Vec::new());
    let mut before = copy()?;
    for _ in 0..TURNS {
        let whole = timed(&|| service.upload(&file).map(|_| ()))?;
        let between = copy()?;
        let in_parts = timed(&|| service.upload_in_parts(&file, PARTS))?;
        let after = copy()?;
        let (of_whole, of_parts) = ((before + between) / 2.0 / whole, (between + after) / 2.0 / in_parts);
        println!(
            "one file {whole:6.2} s   {of_whole:.2}x the throughput of a copy with SHA-256 ({before:.2} s before, {between:.2} s after)"
        );
        println!(
            "{PARTS} parts {in_parts:6.2} s   {of_parts:.2}x the throughput of a copy with SHA-256 ({between:.2} s before, {after:.2} s after)"
        );
        wholes.push(of_whole);
        parts.push(of_parts);
        before = after;
    }
    let peak = service.peak_memory_mib()?;
    service.stop()?;
    std::fs::remove_dir_all(&folder)?;
    println!("memory {idle:.1} MiB at rest, {peak:.1} MiB at most");
    figures.push(Figure::at_most("upload_2gib_peak_rss_mib", peak, 150.0));
    figures.push(Figure::at_least("upload_2gib_whole_over_copy", median(&mut wholes), BAR));
    figures.push(Figure::at_least("upload_2gib_in_parts_over_copy", median(&mut parts), BAR));
    Ok(())
}

/// Rows of a usual length, about 1 KiB each.
fn write_rows(path: &Path) -> Result<()> {
    let text = "a quiet film about a loud family, told with patience ".repeat(17);
    let mut out = BufWriter::new(File::create(path)?);
    let (mut written, mut number) = (0, 0_u64);
    loop {
        let row = serde_json::json!({"messages": [
            {"role": "user", "content": format!("{number} {text}")},
            {"role": "assistant", "content": "positive"},
        ]});
        let line = format!("{row}\n");
        // The largest file that is taken is this large and no larger.
        if written + line.len() > BYTES {
            break;
        }
        out.write_all(line.as_bytes())?;
        written += line.len();
        number += 1;
    }
    Ok(out.flush()?)
}

/// What cannot be avoided: every byte is read, hashed, written, and on disk at the end.
fn copy_and_hash(from: &Path, to: &Path) -> Result<()> {
    let (mut source, mut target, mut hash) = (File::open(from)?, File::create(to)?, Sha256::new());
    let mut buffer = vec![0; 1 << 20];
    loop {
        match source.read(&mut buffer)? {
            0 => break,
            read => {
                hash.update(&buffer[..read]);
                target.write_all(&buffer[..read])?;
            }
        }
    }
    target.sync_all()?;
    hash.finalize();
    Ok(std::fs::remove_file(to)?)
}
