//! Two small programs of the bench `http`: a bare handler over the same table to measure beside, and what sends requests to
//! either and counts the answers.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use axum::Json;
use axum::extract::{Path, State};
use axum::routing::get;
use serde_json::{Value, json};
use sqlx::{PgPool, Row};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

#[tokio::main]
async fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments[..] {
        ["bare", database_url] => bare(database_url).await,
        ["load", address, path, key, seconds, connections] => {
            load(address, path, key, seconds.parse()?, connections.parse()?).await
        }
        _ => bail!("usage: bench-http bare DATABASE_URL | load ADDRESS PATH KEY SECONDS CONNECTIONS"),
    }
}

/// One route that reads one row, and nothing else: no key, no project, no log.
async fn bare(database_url: &str) -> Result<()> {
    let pool = sqlx::postgres::PgPoolOptions::new().max_connections(20).connect(database_url).await?;
    let router = axum::Router::new().route("/jobs/{id}", get(one_row)).with_state(pool);
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    println!("{}", listener.local_addr()?);
    Ok(axum::serve(listener, router).await?)
}

async fn one_row(State(pool): State<PgPool>, Path(id): Path<String>) -> Result<Json<Value>, http::StatusCode> {
    let failed = |_: sqlx::Error| http::StatusCode::INTERNAL_SERVER_ERROR;
    let query =
        "select id::text, status, model, metadata, hyperparameters, safety, extract(epoch from created_at)::bigint as created_at
                 from jobs where id = $1::uuid";
    let row = sqlx::query(query).bind(id).fetch_one(&pool).await.map_err(failed)?;
    let text = |column: &str| row.try_get::<String, _>(column).map_err(failed);
    let json = |column: &str| row.try_get::<Value, _>(column).map_err(failed);
    Ok(Json(json!({
        "id": text("id")?,
        "status": text("status")?,
        "model": text("model")?,
        "metadata": json("metadata")?,
        "hyperparameters": json("hyperparameters")?,
        "safety": json("safety")?,
        "created_at": row.try_get::<i64, _>("created_at").map_err(failed)?,
    })))
}

/// Asks again and again over so many connections, and prints how many answers came a second.
async fn load(address: &str, path: &str, key: &str, seconds: u64, connections: usize) -> Result<()> {
    let request = format!("GET {path} HTTP/1.1\r\nhost: bench\r\nauthorization: Bearer {key}\r\n\r\n");
    let until = Instant::now() + Duration::from_secs(seconds);
    let asking: Vec<_> = (0..connections).map(|_| tokio::spawn(ask(address.to_owned(), request.clone(), until))).collect();
    let since = Instant::now();
    let mut answers = 0;
    for one in asking {
        answers += one.await??;
    }
    println!("{}", json!({"answers_per_second": answers as f64 / since.elapsed().as_secs_f64()}));
    Ok(())
}

async fn ask(address: String, request: String, until: Instant) -> Result<u64> {
    let mut stream = TcpStream::connect(address).await?;
    stream.set_nodelay(true)?;
    let (mut answers, mut buffer, mut filled) = (0, vec![0; 1 << 20], 0);
    while Instant::now() < until {
        stream.write_all(request.as_bytes()).await?;
        let mut whole = None;
        while whole.is_none_or(|length| filled < length) {
            let free = buffer.get_mut(filled..).context("an answer is larger than a megabyte")?;
            let read = stream.read(free).await?;
            ensure!(read > 0, "the connection ended");
            filled += read;
            whole = whole.or(answer_length(buffer.get(..filled).unwrap_or_default())?);
        }
        filled = 0;
        answers += 1;
    }
    Ok(answers)
}

/// The bytes of an answer whose head has come.
fn answer_length(bytes: &[u8]) -> Result<Option<usize>> {
    let Some(end) = bytes.windows(4).position(|window| window == b"\r\n\r\n") else { return Ok(None) };
    let head = std::str::from_utf8(bytes.get(..end).unwrap_or_default())?.to_ascii_lowercase();
    ensure!(head.starts_with("http/1.1 200"), "it answered {}", head.lines().next().unwrap_or_default());
    let length =
        head.lines().find_map(|line| line.strip_prefix("content-length:")).context("an answer without content-length")?;
    Ok(Some(end + 4 + length.trim().parse::<usize>()?))
}
