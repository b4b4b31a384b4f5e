//! An HTTP service that loads, lists, swaps and unloads models, and sends their tensors.
//!
//! ```sh
//! cargo run -p dmaload-examples --example service -- 127.0.0.1:8080
//! curl -X PUT localhost:8080/models/llama --json '{"path": "model.safetensors"}' # loads or swaps
//! curl localhost:8080/models
//! curl localhost:8080/models/llama/tensors/lm_head.weight -o lm_head
//! curl -X DELETE localhost:8080/models/llama
//! curl localhost:8080/metrics # for Prometheus
//! ```
//!
//! One loader serves all requests, so its memory limit covers the whole service, and its pool
//! makes reloads cheap. If a client disconnects, its load is cancelled. On SIGINT, the service
//! finishes the running requests and shuts down the loader.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::Arc;

use axum::Router;
use axum::body::Body;
use axum::extract::{Json, Path, State};
use axum::http::StatusCode;
use axum::routing::{get, put};
use dmaload::{ErrorKind, Image, Latency, Loader};
use serde_json::{Value, json};
use tokio::sync::RwLock;

#[derive(Clone)]
struct Service {
    loader: Loader,
    models: Arc<RwLock<BTreeMap<String, Image>>>,
}

type Answer<T> = Result<T, (StatusCode, String)>;

fn to_response(error: dmaload::Error) -> (StatusCode, String) {
    let status = match error.kind() {
        ErrorKind::NotFound => StatusCode::NOT_FOUND,
        ErrorKind::OverLimit | ErrorKind::OutOfMemory => StatusCode::INSUFFICIENT_STORAGE,
        _ => StatusCode::UNPROCESSABLE_ENTITY,
    };
    let hint = error.hint().map(|hint| format!("; {hint}")).unwrap_or_default();
    (status, format!("{error}{hint}\n"))
}

fn not_found(what: &str) -> (StatusCode, String) {
    (StatusCode::NOT_FOUND, format!("no {what}\n"))
}

fn describe(name: &str, image: &Image) -> Value {
    let report = image.report();
    json!({
        "name": name, "bytes": report.bytes, "seconds": report.total.as_secs_f64(), "route": report.route.name(),
        "tensors": image.tensors().count(), "reused_bytes": report.reused_bytes, "fallbacks": report.fallbacks.len(),
    })
}

/// Loads a model. An older model with the same name stays available until the new one is loaded,
/// and stays in memory as long as a request uses it.
async fn load(State(service): State<Service>, Path(name): Path<String>, Json(body): Json<Value>) -> Answer<Json<Value>> {
    let path = body["path"].as_str().ok_or((StatusCode::BAD_REQUEST, "the request body must contain \"path\"\n".to_owned()))?;
    let image = service.loader.load(path).await.map_err(to_response)?;
    let reported = describe(&name, &image);
    let before = service.models.write().await.insert(name, image);
    drop(before);
    Ok(Json(reported))
}

async fn list(State(service): State<Service>) -> Answer<Json<Vec<Value>>> {
    let models = service.models.read().await;
    Ok(Json(models.iter().map(|(name, image)| describe(name, image)).collect()))
}

async fn unload(State(service): State<Service>, Path(name): Path<String>) -> Answer<StatusCode> {
    let removed = service.models.write().await.remove(&name);
    removed.map(|_| StatusCode::NO_CONTENT).ok_or_else(|| not_found("such model"))
}

/// Sends a tensor's bytes from the loaded memory, without a copy.
async fn tensor(State(service): State<Service>, Path((name, tensor)): Path<(String, String)>) -> Answer<Body> {
    let image = service.models.read().await.get(&name).cloned();
    let tensor = image.ok_or_else(|| not_found("such model"))?.tensor(&tensor).map_err(to_response)?;
    Ok(Body::from(tensor.bytes().map_err(to_response)?))
}

/// Reports metrics in the text format of Prometheus:
/// <https://prometheus.io/docs/instrumenting/exposition_formats/>.
async fn metrics(State(service): State<Service>) -> String {
    let seen = service.loader.metrics();
    let mut text = String::new();
    for (name, kind, value) in [
        ("loads_started_total", "counter", seen.loads_started),
        ("loads_finished_total", "counter", seen.loads_finished),
        ("loads_failed_total", "counter", seen.loads_failed),
        ("loads_dropped_total", "counter", seen.loads_dropped),
        ("read_bytes_total", "counter", seen.read_bytes),
        ("segments_total", "counter", seen.segments),
        ("fallbacks_total", "counter", seen.fallbacks),
        ("retried_reads_total", "counter", seen.retried_reads),
        ("reads_in_flight", "gauge", seen.reads_in_flight),
        ("queue_depth", "gauge", seen.queue_depth),
        ("memory_bytes", "gauge", seen.memory_bytes),
        ("pooled_bytes", "gauge", seen.pooled_bytes),
    ] {
        let _ = writeln!(text, "# TYPE dmaload_{name} {kind}\ndmaload_{name} {value}");
    }
    for (name, latency) in
        [("before_kernel", &seen.before_kernel), ("in_kernel", &seen.in_kernel), ("after_kernel", &seen.after_kernel)]
    {
        histogram(&mut text, name, latency);
    }
    text
}

fn histogram(text: &mut String, name: &str, latency: &Latency) {
    let _ = writeln!(text, "# TYPE dmaload_{name}_seconds histogram");
    let mut sum = 0;
    for (bucket, count) in latency.buckets.iter().enumerate() {
        sum += count;
        let bound = Latency::bound(bucket).map_or("+Inf".to_owned(), |bound| bound.as_secs_f64().to_string());
        let _ = writeln!(text, "dmaload_{name}_seconds_bucket{{le=\"{bound}\"}} {sum}");
    }
    let (all, count) = (latency.sum.as_secs_f64(), latency.count);
    let _ = writeln!(text, "dmaload_{name}_seconds_sum {all}\ndmaload_{name}_seconds_count {count}");
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let address = std::env::args().nth(1).unwrap_or("127.0.0.1:8080".to_owned());
    let loader = Loader::builder().memory_limit_bytes(8 << 30).pool_bytes(4 << 30).build()?;
    let service = Service { loader: loader.clone(), models: Arc::default() };
    let models = Arc::clone(&service.models);
    let app = Router::new()
        .route("/models", get(list))
        .route("/models/{name}", put(load).delete(unload))
        .route("/models/{name}/tensors/{tensor}", get(tensor))
        .route("/metrics", get(metrics))
        .with_state(service);
    let listener = tokio::net::TcpListener::bind(address).await?;
    println!("listening on {}", listener.local_addr()?);
    let interrupted = async {
        let _ = tokio::signal::ctrl_c().await;
    };
    axum::serve(listener, app).with_graceful_shutdown(interrupted).await?;
    drop(models);
    loader.shutdown().await?;
    println!("ended");
    Ok(())
}
