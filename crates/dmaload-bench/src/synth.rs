//! A model to try things on: a valid safetensors file of any size, laid out like a Llama, with random weights.
//!
//! Its bytes are a function of its length, a seed, and the offset, and of nothing else:
//!
//! ```text
//! ┌────────┬─────────────────────────┬──────────────┬─────────┬─ ─ ─┬────────────┬─────────┬──────────┐
//! │ length │ JSON, padded to 8 bytes │ embed_tokens │ layer 0 │     │ model.norm │ lm_head │ inv_freq │
//! └────────┴─────────────────────────┴──────────────┴─────────┴─ ─ ─┴────────────┴─────────┴──────────┘
//!  header: from the layout             data: word i = random(seed, i), made a finite number of its type
//! ```
//!
//! So what was loaded is verified against the generator, not against the file: a reader that mixes up two blocks, or
//! serves the page cache's idea of them, can't pass by being wrong twice. And any piece can be verified without
//! what comes before it.
//!
//! No weight is zero, infinite or NaN: memory that nobody filled can't pass for a weight, and real code can compute
//! with what it loads. Random bits also keep any layer below from compressing or deduplicating the file.

use std::fmt;
use std::fmt::Write as _;
use std::fs::File;
use std::io::Write as _;
use std::path::Path;

use dmaload_text::{At, FileError};

/// The smallest model: below, there is hardly room for the header.
pub const BYTES_MIN: u64 = 4096;
/// One unit of generated content. All tensors begin and end on one.
const WORD: usize = 8;
/// What is generated at a time: large enough for the disk, small enough for the cache.
const BLOCK: usize = 1 << 20;

/// A synthetic model: where its tensors are, and all its bytes on demand.
#[derive(Debug, Clone)]
pub struct Model {
    /// The length of the file.
    pub bytes: u64,
    /// What makes its weights differ from another model's.
    pub seed: u64,
    /// Its tensors, in the order of the file.
    pub tensors: Vec<Tensor>,
    /// Everything before the weights: the length and the padded JSON.
    header: Vec<u8>,
}

/// A tensor of a [`Model`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tensor {
    /// Named as in a Llama checkpoint.
    pub name: String,
    /// What its elements are.
    pub dtype: Dtype,
    /// Its dimensions, outermost first.
    pub shape: Vec<u64>,
    /// Where it begins in the file.
    pub offset: u64,
    /// How long it is.
    pub bytes: u64,
}

impl Tensor {
    fn end(&self) -> u64 {
        self.offset + self.bytes
    }
}

/// The types of elements that a synthetic model has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dtype {
    /// Weights: between 2⁻¹⁵ and 2⁻⁷, of either sign.
    Bf16,
    /// Norms and frequencies: from ½ up to 1.
    F32,
}

impl Dtype {
    fn size(self) -> u64 {
        match self {
            Self::Bf16 => 2,
            Self::F32 => 4,
        }
    }

    /// Turns eight random bytes into finite numbers: keeps some bits, and sets the upper ones of each exponent.
    fn finite(self, word: u64) -> u64 {
        match self {
            Self::Bf16 => word & 0x83FF_83FF_83FF_83FF | 0x3800_3800_3800_3800,
            Self::F32 => word & 0x007F_FFFF_007F_FFFF | 0x3F00_0000_3F00_0000,
        }
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Bf16 => "BF16",
            Self::F32 => "F32",
        })
    }
}

/// Why there is no model.
#[derive(Debug, thiserror::Error)]
pub enum SynthError {
    /// Too small for a header and a tensor.
    #[error("a synthetic model has at least {BYTES_MIN} bytes, not {0}")]
    TooSmall(u64),
    /// It could not be written.
    #[error(transparent)]
    File(#[from] FileError),
}

/// What is wrong with bytes that should be those of a synthetic model.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Mismatch {
    /// Too few or too many.
    #[error("{found} bytes instead of {expected}")]
    Length {
        /// How many the model has.
        expected: u64,
        /// How many there were.
        found: u64,
    },
    /// One is wrong; the first.
    #[error("byte {offset} ({place}) is {found:#04x} instead of {expected:#04x}")]
    Byte {
        /// Where in the file.
        offset: u64,
        /// The tensor that it belongs to, or the header.
        place: String,
        /// What the generator says.
        expected: u8,
        /// What was there.
        found: u8,
    },
}

impl Model {
    /// Lays a model out. Nothing is written.
    ///
    /// # Errors
    /// When the size is below [`BYTES_MIN`].
    pub fn new(bytes: u64, seed: u64) -> Result<Self, SynthError> {
        if bytes < BYTES_MIN {
            return Err(SynthError::TooSmall(bytes));
        }
        let bytes = bytes - bytes % WORD as u64;
        let dimensions = Dimensions::for_size(bytes);
        // The layers are estimated without the header, which costs about one part in a thousand of a small model.
        (0..=dimensions.layers_at_most(bytes))
            .rev()
            .find_map(|layers| Self::with_layers(dimensions, layers, bytes, seed))
            .ok_or(SynthError::TooSmall(bytes))
    }

    /// `None` if so many layers leave no room for their own header.
    fn with_layers(dimensions: Dimensions, layers: u64, bytes: u64, seed: u64) -> Option<Self> {
        let mut tensors = dimensions.tensors(layers);
        let data: u64 = tensors.iter().map(|tensor| tensor.bytes).sum();
        let room = bytes.checked_sub(data)?;
        // How much is left depends on the length of the header, which depends on the digits of how much is left. So
        // the header is measured with more than can be left, and the real one padded to the same length.
        let mut measured = tensors.clone();
        measured.extend(dimensions.tail(room / dimensions.row_bytes() + 1, dimensions.row_bytes()));
        let padded = json(&measured, seed).len().next_multiple_of(WORD);

        let header_bytes = (WORD + padded) as u64;
        tensors.extend(dimensions.rest(room.checked_sub(header_bytes)?));
        place(&mut tensors, header_bytes);
        let header = padded_header(&json(&tensors, seed), padded);
        debug_assert_eq!(tensors.last().map(Tensor::end), Some(bytes), "the last tensor ends the file");
        Some(Self { bytes, seed, tensors, header })
    }

    /// Writes an empty file, and flushes it to storage. `path` is for errors only.
    ///
    /// # Errors
    /// When the file can't be written or flushed.
    pub fn write(&self, mut file: &File, path: &Path, mut progress: impl FnMut(u64)) -> Result<(), FileError> {
        let mut block = vec![0; BLOCK];
        let mut written = 0;
        while written < self.bytes {
            let block = block_of(&mut block, self.bytes - written);
            self.generate(written, block);
            file.write_all(block).at("write to", path)?;
            written += block.len() as u64;
            progress(written);
        }
        file.sync_all().at("flush", path)
    }

    /// Whether these are all the bytes of the model.
    ///
    /// # Errors
    /// The first difference; a length of its own is one, too.
    pub fn verify_all(&self, content: &[u8]) -> Result<(), Mismatch> {
        if content.len() as u64 != self.bytes {
            return Err(Mismatch::Length { expected: self.bytes, found: content.len() as u64 });
        }
        self.verify(0, content)
    }

    /// Whether `content` is what the model has from `offset` on. Any piece will do, wherever it is cut.
    ///
    /// # Errors
    /// The first byte that differs; or that the piece reaches beyond the end.
    fn verify(&self, offset: u64, content: &[u8]) -> Result<(), Mismatch> {
        let end = offset.saturating_add(content.len() as u64);
        if end > self.bytes {
            return Err(Mismatch::Length { expected: self.bytes, found: end });
        }
        let mut block = vec![0; BLOCK];
        // Content is generated in whole words, so a piece that begins within one is compared from there on.
        let mut at = offset - offset % WORD as u64;
        let mut skip = usize::try_from(offset - at).expect("less than a word");
        let mut rest = content;
        while !rest.is_empty() {
            let expected = block_of(&mut block, self.bytes - at);
            self.generate(at, expected);
            let (piece, others) = rest.split_at(rest.len().min(expected.len() - skip));
            compare(&expected[skip..][..piece.len()], piece)
                .map_err(|differs| self.mismatch(at + (skip + differs) as u64, expected[skip + differs], piece[differs]))?;
            at += expected.len() as u64;
            skip = 0;
            rest = others;
        }
        Ok(())
    }

    fn mismatch(&self, offset: u64, expected: u8, found: u8) -> Mismatch {
        let index = self.tensors.partition_point(|tensor| tensor.end() <= offset);
        let place = if offset < self.header.len() as u64 { "the header".into() } else { self.tensors[index].name.clone() };
        Mismatch::Byte { offset, place, expected, found }
    }

    /// Fills a block with what the file has at `offset`. Both are whole words.
    fn generate(&self, offset: u64, block: &mut [u8]) {
        let mut at = offset;
        let mut rest = block;
        if let Some(header) = usize::try_from(at).ok().and_then(|at| self.header.get(at..)) {
            let (now, later) = rest.split_at_mut(rest.len().min(header.len()));
            now.copy_from_slice(&header[..now.len()]);
            at += now.len() as u64;
            rest = later;
        }
        let first = self.tensors.partition_point(|tensor| tensor.end() <= at);
        for tensor in &self.tensors[first..] {
            if rest.is_empty() {
                break;
            }
            let left = usize::try_from(tensor.end() - at).unwrap_or(usize::MAX);
            let (now, later) = rest.split_at_mut(rest.len().min(left));
            fill(now, tensor.dtype, self.seed, at);
            at += now.len() as u64;
            rest = later;
        }
    }
}

/// The next block to work on: a whole one, or what is left.
fn block_of(block: &mut [u8], left: u64) -> &mut [u8] {
    let length = usize::try_from(left).unwrap_or(usize::MAX).min(block.len());
    &mut block[..length]
}

fn fill(words: &mut [u8], dtype: Dtype, seed: u64, offset: u64) {
    // Seeds are small numbers, and neighbours: spread out, their sequences do not overlap.
    let seed = random(seed, 1);
    let first = offset / WORD as u64;
    // One loop for each type, so that its constants are in registers.
    match dtype {
        Dtype::Bf16 => fill_with(words, |i| Dtype::Bf16.finite(random(seed, first + i))),
        Dtype::F32 => fill_with(words, |i| Dtype::F32.finite(random(seed, first + i))),
    }
}

#[inline]
fn fill_with(words: &mut [u8], word: impl Fn(u64) -> u64) {
    let (words, rest) = words.as_chunks_mut::<WORD>();
    debug_assert!(rest.is_empty(), "tensors end on words");
    for (i, bytes) in words.iter_mut().enumerate() {
        *bytes = word(i as u64).to_le_bytes();
    }
}

/// `WyRand` entered at any place: it counts, so the state of step `index` is one multiplication away.
///
/// One widening multiplication a word is what a core does several GB/s of, and no more is asked of the randomness than
/// that no two places look alike.
#[inline]
fn random(seed: u64, index: u64) -> u64 {
    let state = seed.wrapping_add(index.wrapping_mul(0xA076_1D64_78BD_642F));
    let other = state ^ 0xE703_7ED1_A0B4_28DB;
    let upper = (u128::from(state) * u128::from(other)) >> 64;
    upper as u64 ^ state.wrapping_mul(other)
}

/// The index of the first difference. Equal blocks, which nearly all are, are compared at the speed of memory.
fn compare(expected: &[u8], found: &[u8]) -> Result<(), usize> {
    if expected == found {
        return Ok(());
    }
    match expected.iter().zip(found).position(|(a, b)| a != b) {
        Some(differs) => Err(differs),
        None => Ok(()),
    }
}

/// The proportions of a Llama, scaled so that a model of any size has a good many layers.
#[derive(Debug, Clone, Copy)]
struct Dimensions {
    hidden: u64,
    vocabulary: u64,
}

impl Dimensions {
    /// A model that can have it has at least so many layers.
    const LAYERS_MIN: u64 = 12;

    /// The widest that has room for enough layers.
    fn for_size(bytes: u64) -> Self {
        let widths = [8192, 4096, 2048, 1024, 512, 256, 128, 64, 32, 16, 8];
        let [.., narrowest] = widths.map(Self::with_width);
        widths
            .map(Self::with_width)
            .into_iter()
            .find(|dimensions| dimensions.layers_at_most(bytes) >= Self::LAYERS_MIN)
            .unwrap_or(narrowest)
    }

    fn with_width(hidden: u64) -> Self {
        Self { hidden, vocabulary: (16 * hidden).min(32_000) }
    }

    /// One token's row in the embedding, and in the output head.
    fn row_bytes(self) -> u64 {
        self.hidden * Dtype::Bf16.size()
    }

    fn layers_at_most(self, bytes: u64) -> u64 {
        let around = sum(&self.tensors(0));
        let layer = sum(&self.tensors(1)) - around;
        bytes.saturating_sub(around) / layer
    }

    /// All tensors but those that fill up the rest, not placed yet.
    fn tensors(self, layers: u64) -> Vec<Tensor> {
        let mut tensors = vec![tensor("model.embed_tokens.weight", Dtype::Bf16, &[self.vocabulary, self.hidden])];
        tensors.extend((0..layers).flat_map(|layer| self.layer(layer)));
        tensors.push(tensor("model.norm.weight", Dtype::F32, &[self.hidden]));
        tensors
    }

    /// Grouped-query attention with a quarter of the heads for keys and values, and a gated feed-forward block.
    fn layer(self, layer: u64) -> [Tensor; 9] {
        let Self { hidden, .. } = self;
        let (values, inner) = (hidden / 4, hidden * 4);
        let weight = |part: &str, shape: &[u64]| tensor(&format!("model.layers.{layer}.{part}.weight"), Dtype::Bf16, shape);
        let norm = |part: &str| tensor(&format!("model.layers.{layer}.{part}.weight"), Dtype::F32, &[hidden]);
        [
            norm("input_layernorm"),
            weight("mlp.down_proj", &[hidden, inner]),
            weight("mlp.gate_proj", &[inner, hidden]),
            weight("mlp.up_proj", &[inner, hidden]),
            norm("post_attention_layernorm"),
            weight("self_attn.k_proj", &[values, hidden]),
            weight("self_attn.o_proj", &[hidden, hidden]),
            weight("self_attn.q_proj", &[hidden, hidden]),
            weight("self_attn.v_proj", &[values, hidden]),
        ]
    }

    /// Makes the size come out exactly: an output head with as many rows as there is room for, then less than a row.
    fn rest(self, bytes: u64) -> impl Iterator<Item = Tensor> {
        self.tail(bytes / self.row_bytes(), bytes % self.row_bytes())
    }

    fn tail(self, rows: u64, left: u64) -> impl Iterator<Item = Tensor> {
        let head = tensor("lm_head.weight", Dtype::Bf16, &[rows, self.hidden]);
        let frequencies = tensor("model.rotary_emb.inv_freq", Dtype::F32, &[left / Dtype::F32.size()]);
        [head, frequencies].into_iter().filter(|tensor| tensor.bytes > 0)
    }
}

fn tensor(name: &str, dtype: Dtype, shape: &[u64]) -> Tensor {
    let bytes = dtype.size() * shape.iter().product::<u64>();
    Tensor { name: name.to_owned(), dtype, shape: shape.to_owned(), offset: 0, bytes }
}

fn sum(tensors: &[Tensor]) -> u64 {
    tensors.iter().map(|tensor| tensor.bytes).sum()
}

/// Puts the tensors one behind the other.
fn place(tensors: &mut [Tensor], start: u64) {
    let mut offset = start;
    for tensor in tensors {
        tensor.offset = offset;
        offset = tensor.end();
    }
}

/// The header's JSON. Offsets count from the end of the header, so that its own length is not in it.
fn json(tensors: &[Tensor], seed: u64) -> String {
    let mut json = format!(r#"{{"__metadata__":{{"format":"pt","generator":"dmaload","seed":"{seed}"}}"#);
    let mut begin = 0;
    for Tensor { name, dtype, shape, bytes, .. } in tensors {
        let end = begin + bytes;
        let shape = shape.iter().map(u64::to_string).collect::<Vec<_>>().join(",");
        write!(json, r#","{name}":{{"dtype":"{dtype}","shape":[{shape}],"data_offsets":[{begin},{end}]}}"#)
            .expect("a String takes any text");
        begin = end;
    }
    json.push('}');
    json
}

fn padded_header(json: &str, padded: usize) -> Vec<u8> {
    let mut header = Vec::with_capacity(WORD + padded);
    header.extend((padded as u64).to_le_bytes());
    header.extend(json.as_bytes());
    debug_assert!(header.len() <= WORD + padded, "the header was measured with more than it has");
    header.resize(WORD + padded, b' ');
    header
}

#[cfg(test)]
#[allow(clippy::cast_possible_truncation, reason = "the numbers of a test are small")]
mod tests {
    use super::*;
    use safetensors::SafeTensors;

    fn write_model(path: &Path, bytes: u64, seed: u64, progress: impl FnMut(u64)) -> Result<Model, SynthError> {
        let model = Model::new(bytes, seed)?;
        let file = File::create(path).at("create", path)?;
        model.write(&file, path, progress)?;
        Ok(model)
    }

    fn verify(content: &[u8], seed: u64, bytes: u64) -> Result<(), Mismatch> {
        Model::new(bytes, seed).unwrap().verify_all(content)
    }

    fn content(bytes: u64, seed: u64) -> Vec<u8> {
        let model = Model::new(bytes, seed).unwrap();
        let mut content = vec![0; model.bytes as usize];
        model.generate(0, &mut content);
        content
    }

    #[test]
    fn any_size_is_met_exactly_and_read_by_the_reference_library() {
        let sizes = (0..400).map(|i| BYTES_MIN + i * 8).chain([65_536, 1_000_000, 1 << 20, 5_000_000, (8 << 20) + 4]);
        for bytes in sizes {
            let content = content(bytes, 7);
            assert_eq!(content.len() as u64, bytes - bytes % 8);
            let read = SafeTensors::deserialize(&content).unwrap_or_else(|error| panic!("{bytes}: {error}"));
            let model = Model::new(bytes, 7).unwrap();
            assert_eq!(read.len(), model.tensors.len());
            for tensor in &model.tensors {
                let view = read.tensor(&tensor.name).unwrap();
                assert_eq!(view.data(), &content[tensor.offset as usize..][..tensor.bytes as usize]);
                assert_eq!(view.dtype().to_string(), tensor.dtype.to_string());
                assert_eq!(view.shape().iter().map(|&n| n as u64).collect::<Vec<_>>(), tensor.shape);
            }
        }
    }

    #[test]
    fn a_large_model_looks_like_a_llama() {
        let model = Model::new(1 << 30, 0).unwrap();
        assert_eq!(model.bytes, 1 << 30);
        let q = model.tensors.iter().find(|t| t.name == "model.layers.11.self_attn.q_proj.weight").unwrap();
        assert_eq!((q.dtype, &*q.shape), (Dtype::Bf16, &[1024, 1024][..]));
        let names: std::collections::BTreeSet<_> = model.tensors.iter().map(|tensor| &tensor.name).collect();
        assert_eq!(names.len(), model.tensors.len());
    }

    #[test]
    fn terabytes_are_only_laid_out() {
        let model = Model::new(2 << 40, 0).unwrap();
        assert_eq!(model.tensors.last().unwrap().end(), 2 << 40);
    }

    #[test]
    fn all_weights_are_finite_and_none_is_zero() {
        let content = content(1 << 20, 3);
        let model = Model::new(1 << 20, 3).unwrap();
        for tensor in &model.tensors {
            let data = &content[tensor.offset as usize..][..tensor.bytes as usize];
            let good = |value: f32, low, high| (low..high).contains(&value.abs());
            match tensor.dtype {
                Dtype::Bf16 => assert!(
                    data.as_chunks::<2>()
                        .0
                        .iter()
                        .all(|&[a, b]| { good(f32::from_le_bytes([0, 0, a, b]), 2_f32.powi(-15), 2_f32.powi(-7)) })
                ),
                Dtype::F32 => {
                    assert!(data.as_chunks::<4>().0.iter().all(|&word| good(f32::from_le_bytes(word), 0.5, 1.0)));
                }
            }
        }
    }

    /// The content is a promise: a file written by one version is verified by the next.
    #[test]
    fn the_content_never_changes() {
        use dmaload::verify::{Algorithm, digest};
        assert_eq!(digest(Algorithm::Crc32c, &content(1 << 20, 42)).hex(), "f010b478");
    }

    #[test]
    fn seeds_differ_everywhere() {
        let (one, two) = (content(1 << 16, 1), content(1 << 16, 2));
        let model = Model::new(1 << 16, 1).unwrap();
        let data = model.header.len()..;
        let equal = one[data.clone()].as_chunks::<8>().0.iter().zip(two[data].as_chunks::<8>().0).filter(|(a, b)| a == b);
        assert_eq!(equal.count(), 0);
    }

    #[test]
    fn what_is_written_is_verified() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let bytes = 3 * BLOCK as u64 + 4096;
        let mut seen = Vec::new();
        let model = write_model(file.path(), bytes, 9, |written| seen.push(written)).unwrap();
        assert_eq!(seen.last(), Some(&bytes));
        assert!(seen.is_sorted() && seen.len() == 4);
        let read = std::fs::read(file.path()).unwrap();
        verify(&read, 9, bytes).unwrap();
        for (offset, length) in [(0, 5), (3, 100), (BLOCK - 1, BLOCK + 2), (bytes as usize - 1, 1), (77, 0)] {
            model.verify(offset as u64, &read[offset..][..length]).unwrap();
        }
    }

    #[test]
    fn the_first_wrong_byte_is_named_with_its_tensor() {
        let mut wrong = content(1 << 20, 5);
        let model = Model::new(1 << 20, 5).unwrap();
        let norm = model.tensors.iter().find(|tensor| tensor.name == "model.norm.weight").unwrap();
        for (offset, place) in [(9, "the header"), (norm.offset, "model.norm.weight"), ((1 << 20) - 1, "lm_head.weight")] {
            let byte = wrong[offset as usize];
            wrong[offset as usize] ^= 0x10;
            let expected = Mismatch::Byte { offset, place: place.into(), expected: byte, found: byte ^ 0x10 };
            assert_eq!(verify(&wrong, 5, 1 << 20), Err(expected.clone()));
            let from = offset as usize - 5;
            assert_eq!(model.verify(from as u64, &wrong[from..]), Err(expected));
            wrong[offset as usize] = byte;
        }
    }

    #[test]
    fn a_swapped_page_and_a_missing_end_are_found() {
        let mut wrong = content(1 << 20, 5);
        let (one, two) = wrong.split_at_mut(1 << 19);
        one[4096 * 9..][..4096].swap_with_slice(&mut two[4096 * 3..][..4096]);
        assert!(matches!(verify(&wrong, 5, 1 << 20), Err(Mismatch::Byte { offset, .. }) if offset / 4096 == 9));
        wrong.truncate(1000);
        assert_eq!(verify(&wrong, 5, 1 << 20), Err(Mismatch::Length { expected: 1 << 20, found: 1000 }));
    }

    #[test]
    fn too_small_is_said() {
        let error = Model::new(4095, 0).unwrap_err();
        assert_eq!(error.to_string(), "a synthetic model has at least 4096 bytes, not 4095");
    }

    #[test]
    fn a_write_error_names_the_file() {
        let error = write_model(Path::new("/dev/full"), BYTES_MIN, 0, |_| ()).unwrap_err();
        assert_eq!(error.to_string(), "cannot write to /dev/full: ENOSPC (No space left on device)");
    }
}
