//! Measures the time until a model's first layer has run, and until the whole model has run: with
//! dmaload, and with candle's own loader, which maps the file.
//!
//! ```text
//! just candle-first-layer [FOLDER [PAIRS]]
//! ```
//!
//! The model is candle's own llama (`candle_transformers::models::llama`) with synthetic weights,
//! tied embeddings and 24 layers in F32, 1.4 GB in total. Each run is a separate process, and the
//! file is evicted from the page cache before the run. The clock starts before anything is opened
//! and stops after a forward pass with eight tokens. For the first layer, the same model is built
//! and run with a single layer, which requires only its embedding, its norm and layer 0. The two
//! loaders take turns, and their order alternates from pair to pair. Prints the median time of
//! each loader, and the median of the ratios within a pair.

use std::ffi::OsString;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::llama::{Cache, Config, Llama};
use dmaload::Loader;
use dmaload_candle::Weights;
use rustix::fs::{Advice, fadvise};

const HIDDEN: usize = 1024;
const INTERMEDIATE: usize = 2816;
const VOCABULARY: usize = 32_000;
const LAYERS: usize = 24;
const PAIRS: usize = 7;

fn config(layers: usize) -> Config {
    Config {
        hidden_size: HIDDEN,
        intermediate_size: INTERMEDIATE,
        vocab_size: VOCABULARY,
        num_hidden_layers: layers,
        num_attention_heads: 16,
        num_key_value_heads: 16,
        use_flash_attn: false,
        rms_norm_eps: 1e-5,
        rope_theta: 10_000.0,
        bos_token_id: None,
        eos_token_id: None,
        rope_scaling: None,
        max_position_embeddings: 64,
        tie_word_embeddings: true,
    }
}

/// Returns the names and shapes of the model's tensors, sorted by name, as they are in files from
/// model hubs.
fn tensors() -> Vec<(String, Vec<usize>)> {
    let mut tensors =
        vec![("model.embed_tokens.weight".to_owned(), vec![VOCABULARY, HIDDEN]), ("model.norm.weight".to_owned(), vec![HIDDEN])];
    for layer in 0..LAYERS {
        let mut add = |part: &str, shape: &[usize]| tensors.push((format!("model.layers.{layer}.{part}.weight"), shape.to_vec()));
        for part in ["q_proj", "k_proj", "v_proj", "o_proj"] {
            add(&format!("self_attn.{part}"), &[HIDDEN, HIDDEN]);
        }
        add("mlp.gate_proj", &[INTERMEDIATE, HIDDEN]);
        add("mlp.up_proj", &[INTERMEDIATE, HIDDEN]);
        add("mlp.down_proj", &[HIDDEN, INTERMEDIATE]);
        add("input_layernorm", &[HIDDEN]);
        add("post_attention_layernorm", &[HIDDEN]);
    }
    tensors.sort();
    tensors
}

/// Writes the model with small weights that are the same on every machine.
fn write_model(path: &Path) -> Result<()> {
    let (mut entries, mut begin) = (Vec::new(), 0);
    for (name, shape) in tensors() {
        let end = begin + shape.iter().product::<usize>() * 4;
        entries.push(format!(r#""{name}":{{"dtype":"F32","shape":{shape:?},"data_offsets":[{begin},{end}]}}"#));
        begin = end;
    }
    let mut header = format!("{{{}}}", entries.join(","));
    header.extend(std::iter::repeat_n(' ', header.len().next_multiple_of(8) - header.len()));
    let mut file = BufWriter::with_capacity(1 << 20, File::create(path)?);
    file.write_all(&(header.len() as u64).to_le_bytes())?;
    file.write_all(header.as_bytes())?;
    let mut state = 1_u32;
    for _ in 0..begin / 4 {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        let value = (state >> 8) as f32 / (1 << 24) as f32 - 0.5;
        file.write_all(&(value / 16.0).to_le_bytes())?;
    }
    file.into_inner()?.sync_all()?;
    Ok(())
}

/// Loads and runs the model in this process. Prints the elapsed seconds, and the bits of the sum
/// of the logits.
fn run(who: &str, layers: usize, path: &Path) -> Result<()> {
    let begin = Instant::now();
    let (dtype, device) = (DType::F32, Device::Cpu);
    let (vb, weights) = match who {
        "dmaload" => {
            let loader = Loader::new()?;
            // Loads the tensors in the order in which the model requests them.
            let options = loader.load_options().tensors(["model.embed_tokens.*", "model.norm.*", "*"]);
            let weights = Weights::load_with(&loader, [path], options, dtype, &device)?;
            (weights.var_builder(), Some(weights))
        }
        "candle" => (map(path, dtype, &device)?, None),
        other => bail!("unknown loader {other:?}"),
    };
    let config = config(layers);
    let model = Llama::load(vb, &config)?;
    let tokens = Tensor::new(&[[1_u32, 2, 3, 4, 5, 6, 7, 8]], &device)?;
    let mut cache = Cache::new(false, dtype, &config, &device)?;
    let logits = model.forward(&tokens, 0, &mut cache)?;
    let sum = logits.sum_all()?.to_scalar::<f32>()?;
    println!("{} {:08x}", begin.elapsed().as_secs_f64(), sum.to_bits());
    // A run of only the first layer does not wait for the rest of the load.
    if let Some(weights) = weights.filter(|_| layers == LAYERS) {
        weights.finish()?;
    }
    Ok(())
}

/// Opens the file with candle's own loader, which maps it.
#[allow(unsafe_code)]
fn map(path: &Path, dtype: DType, device: &Device) -> Result<VarBuilder<'static>> {
    // SAFETY: nothing writes to the file while this process runs: its parent has written the file
    // and is waiting.
    Ok(unsafe { VarBuilder::from_mmaped_safetensors(&[path], dtype, device)? })
}

/// Runs one measurement in a child process. Returns the elapsed seconds, and the bits of the sum
/// of the logits.
fn measure(who: &str, layers: usize, path: &Path) -> Result<(f64, String)> {
    fadvise(File::open(path)?, 0, None, Advice::DontNeed)?;
    let arguments: [OsString; 4] = ["--run".into(), who.into(), layers.to_string().into(), path.into()];
    let output = Command::new(std::env::current_exe()?).args(arguments).stderr(Stdio::inherit()).output()?;
    ensure!(output.status.success(), "the run with {who} failed: {}", output.status);
    let printed = String::from_utf8(output.stdout)?;
    let (seconds, sum) = printed.trim().split_once(' ').context("the run did not print its seconds and its sum")?;
    Ok((seconds.parse()?, sum.to_owned()))
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn main() -> Result<()> {
    let arguments: Vec<OsString> = std::env::args_os().skip(1).collect();
    if let [flag, who, layers, path] = &*arguments
        && flag == "--run"
    {
        return run(&who.to_string_lossy(), layers.to_string_lossy().parse()?, Path::new(path));
    }
    let folder = arguments.first().map_or_else(std::env::temp_dir, PathBuf::from);
    let pairs = arguments.get(1).map_or(Ok(PAIRS), |pairs| pairs.to_string_lossy().parse())?;
    let file = tempfile::Builder::new().prefix("first-layer.").suffix(".safetensors").tempfile_in(folder)?;
    write_model(file.path())?;
    println!("| until | dmaload | candle's own loader | ratio (median of {pairs} pairs) |");
    println!("|---|---|---|---|");
    for (what, layers) in [("the first layer has run", 1), ("the whole model has run", LAYERS)] {
        let (mut ours, mut theirs, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
        for pair in 0..pairs {
            let order = if pair % 2 == 0 { ["dmaload", "candle"] } else { ["candle", "dmaload"] };
            let mut seconds = [0.0, 0.0];
            let mut sums = Vec::new();
            for who in order {
                let (taken, sum) = measure(who, layers, file.path())?;
                seconds[usize::from(who == "candle")] = taken;
                sums.push(sum);
            }
            ensure!(sums[0] == sums[1], "the two loaders produced different logits: {sums:?}");
            ours.push(seconds[0]);
            theirs.push(seconds[1]);
            ratios.push(seconds[1] / seconds[0]);
        }
        println!("| {what} | {:.2} s | {:.2} s | {:.2} |", median(ours), median(theirs), median(ratios));
    }
    Ok(())
}
