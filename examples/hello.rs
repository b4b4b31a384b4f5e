//! Loads a model and prints its first tensors. Their bytes are views of the loaded memory.

use dmaload::Loader;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let path = std::env::args().nth(1).unwrap_or("model.safetensors".to_owned());
    let loader = Loader::new()?;
    let image = loader.load(path).await?;
    for tensor in image.tensors().take(5) {
        let len = tensor.bytes()?.len();
        println!("{} {} {:?}: {len} bytes", tensor.name(), tensor.dtype(), tensor.shape());
    }
    println!("{} bytes by {}", image.report().bytes, image.report().route);
    Ok(())
}
