//! Compares every tensor of a published model, byte for byte, with what the `safetensors` crate
//! reads from the same file.
//!
//! `just real-model` fetches the model and runs this test, which is skipped unless
//! `DMALOAD_REAL_MODEL` names a file.

mod common;

use common::{ROUTES, assert_same};
use dmaload::{Layout, LoadOptions, Loader};

#[tokio::test]
async fn real_model_tensors_match_the_safetensors_crate() {
    let Some(path) = std::env::var_os("DMALOAD_REAL_MODEL") else {
        println!("skipped: DMALOAD_REAL_MODEL is not set; `just real-model` fetches a model");
        return;
    };
    let bytes = std::fs::read(&path).unwrap();
    let oracle = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let loader = Loader::builder().load_options(LoadOptions::new().segment_bytes(4 << 20)).build().unwrap();
    for route in ROUTES {
        for layout in [Layout::Segmented, Layout::Single, Layout::Tensors] {
            let options = loader.load_options().route(route).layout(layout).strict(true);
            let image = loader.load(&path).options(options).await.unwrap();
            assert_eq!(image.tensors().count(), oracle.len());
            for (name, expected) in oracle.iter() {
                let tensor = image.tensor(name).unwrap();
                assert_eq!(tensor.dtype().to_string(), expected.dtype().to_string(), "{name}");
                assert_eq!(tensor.shape(), expected.shape(), "{name}");
                assert_same(&tensor.bytes().unwrap(), expected.data(), name);
                let mut parts = Vec::with_capacity(expected.data().len());
                for part in tensor.parts() {
                    parts.extend_from_slice(&part.segment.bytes().unwrap()[part.offset..part.offset + part.len]);
                }
                assert_same(&parts, expected.data(), &format!("the parts of {name}"));
            }
        }
    }
    println!("{} tensors, {} bytes: identical for every route and layout", oracle.len(), bytes.len());
}
