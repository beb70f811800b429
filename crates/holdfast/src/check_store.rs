//! `holdfast check-store`: does with the object store what the service does with it, and says what came of each.

use std::time::Instant;

use anyhow::{Context, Result, ensure};
use futures::TryStreamExt;
use holdfast_store::{ObjectRef, Objects, Store};

use crate::connect::connect_to_try;
use crate::settings::StoreArgs;

/// Where its objects are, under the store's prefix.
const FOLDER: &str = "check-store";
/// More than one part's worth, and no whole number of them.
const LARGE: usize = 12_000_003;

/// Does it.
///
/// # Errors
/// The first thing that the store does not do.
pub async fn run(args: &StoreArgs) -> Result<()> {
    let connection = connect_to_try(args).await?;
    let outcome = try_all(&connection.store).await;
    connection.close().await?;
    outcome
}

async fn try_all(store: &Store) -> Result<()> {
    let small = b"holdfast".to_vec();
    // No two parts alike.
    let large: Vec<u8> = (0..LARGE).map(|i| i.wrapping_mul(2_654_435_761).to_le_bytes()[3]).collect();
    let objects = store.objects();
    try_out("a small object, written and read", round_trip(store, "small", &small)).await?;
    try_out("an object in parts, written and read", round_trip(store, "large", &large)).await?;
    try_out("a range of an object", range(objects, &large)).await?;
    try_out("an upload that is given up", give_up(objects, &large)).await?;
    match objects.signed_url(&key("signed")).await {
        Some(_) => println!("a signed URL: ok, downloads of adapters go past the API"),
        None => println!("a signed URL: none, downloads of adapters go through the API"),
    }
    println!("the store does what the service needs");
    Ok(())
}

async fn try_out<T, E: Into<anyhow::Error>>(what: &str, trial: impl Future<Output = Result<T, E>>) -> Result<T> {
    let since = Instant::now();
    let outcome = trial.await.map_err(|error| error.into().context(format!("{what}: failed")))?;
    println!("{what}: ok, {:.2} s", since.elapsed().as_secs_f64());
    Ok(outcome)
}

fn key(name: &str) -> String {
    format!("{FOLDER}/{name}-{}", std::process::id())
}

/// Writes an object, does something with it, and removes it whatever came of that.
async fn with_object<T>(
    objects: &Objects,
    name: &str,
    bytes: &[u8],
    act: impl AsyncFnOnce(&ObjectRef) -> Result<T>,
) -> Result<T> {
    let object = objects.stage_bytes(key(name), bytes).await?;
    let outcome = act(&object).await;
    objects.discard(&object).await;
    outcome
}

async fn round_trip(store: &Store, name: &str, bytes: &[u8]) -> Result<()> {
    let objects = store.objects();
    with_object(objects, name, bytes, async |object| {
        let copy = tempfile::NamedTempFile::new()?;
        // Checks the hash as well.
        objects.fetch(object, copy.path()).await?;
        ensure!(std::fs::read(copy.path())? == bytes, "other bytes came back");
        Ok(())
    })
    .await
}

async fn range(objects: &Objects, bytes: &[u8]) -> Result<()> {
    with_object(objects, "range", bytes, async |object| {
        let wanted = 5_000_000..5_000_100;
        let parts: Vec<_> = objects.read_range(&object.key, wanted.clone()).await?.try_collect().await?;
        let expected = bytes.get(5_000_000..5_000_100).context("too short")?;
        ensure!(parts.concat() == expected, "other bytes came back");
        Ok(())
    })
    .await
}

async fn give_up(objects: &Objects, bytes: &[u8]) -> Result<()> {
    let mut writer = objects.stage(key("given-up")).await?;
    writer.write(bytes).await?;
    Ok(writer.try_abort().await?)
}
