//! `bench-safety-import SOURCE OUT`: a base model's folder for the safety bench, without a service.

use std::path::PathBuf;

fn main() -> anyhow::Result<()> {
    let [source, out]: [PathBuf; 2] = std::env::args_os()
        .skip(1)
        .map(PathBuf::from)
        .collect::<Vec<_>>()
        .try_into()
        .map_err(|_| anyhow::anyhow!("usage: bench-safety-import SOURCE OUT"))?;
    holdfast_import::import_once(&source, &out, env!("CARGO_PKG_VERSION"))?;
    Ok(())
}
