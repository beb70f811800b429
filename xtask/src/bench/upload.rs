//! A file of 1 GiB through `POST /v1/files`, beside the same bytes through a copy that hashes them.

use std::fs::File;
use std::io::{BufWriter, Read, Write};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Result;
use sha2::{Digest, Sha256};

use super::{Figure, Wanted};
use crate::service::Service;
use crate::setup::{self, Libtorch};
use crate::shell;

const BYTES: usize = 1 << 30;

pub(super) fn run(_: Wanted<'_>, figures: &mut Vec<Figure>) -> Result<()> {
    setup::run(Libtorch::Cpu)?;
    let programs = shell::build_release()?;
    let folder = shell::target().join("bench-upload");
    let data = folder.join("data");
    std::fs::create_dir_all(&data)?;
    let file = folder.join("rows.jsonl");
    write_rows(&file)?;
    let copy = copy_and_hash(&file, &folder.join("copy"))?;
    let service = Service::start(&programs.join("holdfast"), &data)?;
    let idle = service.peak_memory_mib()?;
    let since = Instant::now();
    service.upload(&file)?;
    let upload = since.elapsed();
    let peak = service.peak_memory_mib()?;
    service.stop()?;
    std::fs::remove_dir_all(&folder)?;

    let ratio = upload.as_secs_f64() / copy.as_secs_f64();
    println!("memory at rest         {idle:8.1} MiB");
    println!("memory at most         {peak:8.1} MiB");
    println!("upload and check       {:8.2} s", upload.as_secs_f64());
    println!("copy with SHA-256      {:8.2} s   the upload takes {ratio:.2} times as long", copy.as_secs_f64());
    figures.push(Figure { name: "upload_1gib_peak_rss_mib", measured: peak, bar: 150.0 });
    Ok(())
}

/// Rows of a usual length, about 1 KiB each.
fn write_rows(path: &Path) -> Result<()> {
    let text = "a quiet film about a loud family, told with patience ".repeat(17);
    let mut out = BufWriter::new(File::create(path)?);
    let (mut written, mut number) = (0, 0_u64);
    while written < BYTES {
        let row = serde_json::json!({"messages": [
            {"role": "user", "content": format!("{number} {text}")},
            {"role": "assistant", "content": "positive"},
        ]});
        let line = format!("{row}\n");
        out.write_all(line.as_bytes())?;
        written += line.len();
        number += 1;
    }
    Ok(out.flush()?)
}

/// What cannot be avoided: every byte is read, hashed, written, and on disk at the end.
fn copy_and_hash(from: &Path, to: &Path) -> Result<Duration> {
    let since = Instant::now();
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
    let took = since.elapsed();
    std::fs::remove_file(to)?;
    Ok(took)
}
