//! Settings that cannot work: a program says which and stops.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use holdfast_tests::{S3Server, TestApp, program};
use tempfile::TempDir;

/// What a program says that cannot start.
fn refusal(command: &mut Command) -> Result<String> {
    let output = command.stdout(Stdio::null()).output()?;
    assert!(!output.status.success(), "it started");
    Ok(String::from_utf8_lossy(&output.stderr).into_owned())
}

/// Brings the database up to date, with its data under `data` and its objects in `store`.
fn migrate(app: &TestApp, data: &TempDir, store: &str) -> Result<Command> {
    let mut command = Command::new(program("holdfast")?);
    command.arg("migrate").env("DATABASE_URL", app.database_url()).env("HOLDFAST_OBJECT_STORE", store);
    command.env("HOLDFAST_DATA_DIR", data.path());
    Ok(command)
}

#[test]
fn a_store_that_cannot_be_used_is_named_with_its_setting() -> Result<()> {
    let app = TestApp::start()?;
    let (s3, data) = (S3Server::start()?, tempfile::tempdir()?);
    for (store, expected) in [
        ("ftp://somewhere/else", "ftp:// is no object store"),
        ("s3:/bucket/x", "is s3:// meant?"),
        ("s3://no-such-bucket/x", "no-such-bucket"),
        ("/proc/nothing/here", "/proc/nothing/here"),
    ] {
        let said = refusal(migrate(&app, &data, store)?.envs(s3.settings()))?;
        assert!(said.contains(expected) && said.lines().count() == 1, "{store}: {said}");
    }
    let said = refusal(migrate(&app, &data, "s3://bucket/x")?.envs(s3.settings()).env("AWS_SECRET_ACCESS_KEY", "wrong"))?;
    assert!(said.contains("HOLDFAST_OBJECT_STORE"), "{said}");
    Ok(())
}

#[test]
fn a_store_that_holds_nothing_of_what_the_database_names_is_not_taken_into_use() -> Result<()> {
    let app = TestApp::start()?;
    let (other, data) = (tempfile::tempdir()?, tempfile::tempdir()?);
    let said = refusal(&mut migrate(&app, &data, &other.path().to_string_lossy())?)?;
    assert!(said.contains("HOLDFAST_OBJECT_STORE") && said.contains("not mounted"), "{said}");
    assert_eq!(other.path().read_dir()?.count(), 0, "it was marked all the same");
    // One that lost its mark is known by what it holds.
    std::fs::remove_file(app.objects().join(holdfast_store::MARK))?;
    assert_eq!(app.call("GET", "/readyz", None)?.status, 503);
    assert!(migrate(&app, &data, &app.objects().to_string_lossy())?.status()?.success());
    assert_eq!(app.call("GET", "/readyz", None)?.status, 200);
    Ok(())
}

#[test]
fn a_database_that_does_not_answer_is_named_with_its_setting() -> Result<()> {
    let app = TestApp::start()?;
    let data = tempfile::tempdir()?;
    let store = data.path().join("objects").to_string_lossy().into_owned();
    let said = refusal(migrate(&app, &data, &store)?.env("DATABASE_URL", "postgres://127.0.0.1:1/nothing"))?;
    assert!(said.contains("DATABASE_URL"), "{said}");
    Ok(())
}

#[test]
fn a_folder_is_closed_to_others_unless_it_holds_what_is_not_the_service_s() -> Result<()> {
    let app = TestApp::start()?;
    let (data, foreign) = (tempfile::tempdir()?, tempfile::tempdir()?);
    std::fs::write(foreign.path().join("letter.txt"), "of somebody else")?;
    std::fs::set_permissions(foreign.path(), std::fs::Permissions::from_mode(0o755))?;
    let mode_after = |folder: &Path| -> Result<u32> {
        migrate(&app, &data, &folder.to_string_lossy())?.env("DATABASE_URL", "postgres://127.0.0.1:1/nothing").output()?;
        Ok(std::fs::metadata(folder)?.permissions().mode() & 0o777)
    };
    assert_eq!(mode_after(&data.path().join("objects"))?, 0o700);
    assert_eq!(mode_after(foreign.path())?, 0o755);
    Ok(())
}

#[test]
fn a_second_worker_of_the_same_name_does_not_start() -> Result<()> {
    let app = TestApp::start()?;
    let held = app.runtime.block_on(app.store.take_worker_name("gpu-1"))?.context("the name is free")?;
    assert!(app.runtime.block_on(app.store.take_worker_name("gpu-1"))?.is_none());
    let data = tempfile::tempdir()?;
    let command = migrate(&app, &data, &app.objects().to_string_lossy())?;
    let mut second = Command::new(program("holdfast")?);
    second.args(["worker", "--worker-name", "gpu-1"]).envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))));
    let said = refusal(&mut second)?;
    assert!(said.contains("another worker is called \"gpu-1\"") && said.contains("--worker-name"), "{said}");
    app.runtime.block_on(held.release())?;
    assert!(app.runtime.block_on(app.store.take_worker_name("gpu-1"))?.is_some(), "a name that was given back is free");
    Ok(())
}

/// A folder that nobody can write to. Root can write anywhere but on a disk that is mounted to be read.
struct ReadOnly(TempDir);

impl ReadOnly {
    fn new() -> Result<Self> {
        let folder = tempfile::tempdir()?;
        std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o555))?;
        if rustix::process::geteuid().is_root() {
            let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", "ro", "tmpfs"]).arg(folder.path()).status()?;
            ensure!(mounted.success(), "cannot mount");
        }
        Ok(Self(folder))
    }

    fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for ReadOnly {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.path()).stderr(Stdio::null()).status();
    }
}

#[test]
fn a_folder_that_cannot_be_written_is_named_with_its_setting() -> Result<()> {
    let app = TestApp::start()?;
    let (read_only, data) = (ReadOnly::new()?, tempfile::tempdir()?);
    let said = refusal(&mut migrate(&app, &data, &read_only.path().to_string_lossy())?)?;
    assert!(said.contains("HOLDFAST_OBJECT_STORE") && said.lines().count() == 1, "{said}");

    let mut worker = Command::new(program("holdfast")?);
    worker.args(["worker", "--worker-name", "w"]).env("DATABASE_URL", app.database_url());
    worker.env("HOLDFAST_OBJECT_STORE", app.objects()).env("HOLDFAST_DATA_DIR", read_only.path());
    let said = refusal(&mut worker)?;
    assert!(said.contains("--data-dir") && said.contains(&*read_only.path().to_string_lossy()), "{said}");
    Ok(())
}
