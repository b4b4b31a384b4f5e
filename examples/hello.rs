//! Loads a model and looks at a tensor, without a copy.

use dmaload::Loader;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let path = std::env::args().nth(1).unwrap_or("model.safetensors".to_owned());
    let loader = Loader::new()?;
    let image = loader.load(path).await?;
    for tensor in image.tensors().take(5) {
        println!("{} {} {:?}: {} bytes", tensor.name(), tensor.dtype(), tensor.shape(), tensor.bytes()?.len());
    }
    println!("{} bytes by {}", image.report().bytes, image.report().route);
    Ok(())
}
