//! Runs MiniLM (a BERT with six layers) twice: with weights that dmaload loads, and with weights
//! that candle's own loader loads. The two embeddings must be equal bit for bit.
//!
//! `just candle` downloads the model and runs this example.

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::bert::{BertModel, Config};
use dmaload::Loader;
use dmaload_candle::Weights;

/// The configuration of <https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2>.
const CONFIG: &str = r#"{
    "model_type": "bert", "vocab_size": 30522, "hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12,
    "intermediate_size": 1536, "hidden_act": "gelu", "hidden_dropout_prob": 0.1, "max_position_embeddings": 512,
    "type_vocab_size": 2, "initializer_range": 0.02, "layer_norm_eps": 1e-12, "pad_token_id": 0,
    "position_embedding_type": "absolute", "use_cache": true, "classifier_dropout": null
}"#;

/// The tokens of "the quick brown fox jumps over the lazy dog", between start and end tokens.
const TOKENS: [u32; 11] = [101, 1996, 4248, 2829, 4419, 14523, 2058, 1996, 13971, 3899, 102];

/// Returns the embedding as the model's authors define it: the normalized mean of the last layer.
fn embedding(weights: VarBuilder<'_>) -> Result<Vec<f32>> {
    let config: Config = serde_json::from_str(CONFIG)?;
    let device = Device::Cpu;
    let model = BertModel::load(weights, &config)?;
    let tokens = Tensor::new(&TOKENS[..], &device)?.unsqueeze(0)?;
    let types = tokens.zeros_like()?;
    let last = model.forward(&tokens, &types, None)?;
    let mean = (last.sum(1)? / TOKENS.len() as f64)?;
    let unit = mean.broadcast_div(&mean.sqr()?.sum_keepdim(1)?.sqrt()?)?;
    Ok(unit.squeeze(0)?.to_vec1()?)
}

fn main() -> Result<()> {
    let path =
        std::env::args().nth(1).context("the model's path is missing: `just candle` downloads a model and passes its path")?;
    let weights = Weights::load(&Loader::new()?, &path, DType::F32, &Device::Cpu)?;
    let ours = embedding(weights.var_builder())?;
    let report = weights.finish()?;
    println!("{} bytes by {}", report.bytes, report.route);
    let bytes = std::fs::read(&path)?;
    let theirs = embedding(VarBuilder::from_buffered_safetensors(bytes, DType::F32, &Device::Cpu)?)?;
    let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
    ensure!(bits(&ours) == bits(&theirs), "the embeddings differ: {:?} and {:?}", &ours[..4], &theirs[..4]);
    ensure!(ours.len() == 384 && ours.iter().any(|&value| value != 0.0), "the embedding is empty");
    println!("{} numbers, equal bit for bit: {:?} …", ours.len(), &ours[..4]);
    Ok(())
}
