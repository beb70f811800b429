//! What the program says of its work: lines for people or for machines, and traces for those who collect them.

use std::io::IsTerminal;

use anyhow::{Context, Result};
use clap::{Args, ValueEnum};
use opentelemetry::trace::TracerProvider;
use opentelemetry_otlp::{SpanExporter, WithExportConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::SdkTracerProvider;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer};

/// What is logged unless HOLDFAST_LOG says otherwise.
const DEFAULT_FILTER: &str = "info,sqlx=warn,opentelemetry=warn,hyper_util=warn,reqwest=warn";

/// How the program says what it does.
#[derive(Debug, Clone, Args)]
pub struct TelemetryArgs {
    /// How log lines are written to standard error; HOLDFAST_LOG chooses which, as `info` or `debug,sqlx=warn`.
    #[arg(long, global = true, env = "HOLDFAST_LOG_FORMAT", value_enum, default_value_t = LogFormat::Text)]
    pub log_format: LogFormat,
    /// Where traces are sent by OTLP over HTTP, as http://collector:4318; nowhere unless set.
    #[arg(long, global = true, env = "OTEL_EXPORTER_OTLP_ENDPOINT", value_name = "URL")]
    pub otlp_endpoint: Option<String>,
}

/// How log lines are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line, with the request's or the job's id.
    Json,
}

/// What must be sent before the program ends.
#[derive(Debug)]
pub struct Telemetry(Option<SdkTracerProvider>);

impl Telemetry {
    /// Begins to log, and to trace where that is asked for.
    ///
    /// # Errors
    /// When the collector's URL cannot be used.
    pub fn start(args: &TelemetryArgs) -> Result<Self> {
        let filter = EnvFilter::try_from_env("HOLDFAST_LOG").unwrap_or_else(|_| EnvFilter::new(DEFAULT_FILTER));
        let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
        let lines = match args.log_format {
            LogFormat::Text => lines.with_ansi(std::io::stderr().is_terminal()).boxed(),
            LogFormat::Json => lines.json().flatten_event(true).with_span_list(true).with_current_span(false).boxed(),
        };
        let provider = args.otlp_endpoint.as_deref().map(provider).transpose()?;
        let traces = provider.as_ref().map(|provider| tracing_opentelemetry::layer().with_tracer(provider.tracer("holdfast")));
        tracing_subscriber::registry().with(filter).with(lines).with(traces).init();
        Ok(Self(provider))
    }

    /// Sends what is still to be sent.
    pub fn finish(self) {
        if let Some(provider) = self.0
            && let Err(error) = provider.shutdown()
        {
            eprintln!("holdfast: the last traces could not be sent: {error}");
        }
    }
}

fn provider(endpoint: &str) -> Result<SdkTracerProvider> {
    // As the standard has it: what is given is the collector's address, and the kind of data is the path.
    let url = format!("{}/v1/traces", endpoint.trim_end_matches('/'));
    let exporter = SpanExporter::builder()
        .with_http()
        .with_endpoint(&url)
        .build()
        .with_context(|| format!("traces cannot be sent to {endpoint} (--otlp-endpoint)"))?;
    Ok(SdkTracerProvider::builder()
        .with_batch_exporter(exporter)
        .with_resource(Resource::builder().with_service_name("holdfast").build())
        .build())
}
