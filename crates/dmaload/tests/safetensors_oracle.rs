//! Compares the parser with the `safetensors` crate, which the format's authors maintain.
//!
//! The parser reads every valid file as the crate does, whether or not the crate wrote the file.
//! It accepts no damaged file that the crate refuses. If both accept a damaged file, they read the
//! same tensors and metadata. [`stricter_on_purpose`] lists where the parser is stricter, and why.

#![allow(clippy::unwrap_used, reason = "a setup error should fail the test")]

use std::{
    cell::Cell,
    collections::{BTreeMap, HashMap},
    fmt::Write,
    time::{Duration, Instant},
};

use dmaload::model::{
    DType, ModelError, TensorMap,
    safetensors::{Sniff, parse, parse_prefix, sniff},
};
use proptest::{
    collection::{btree_map, vec},
    option,
    prelude::*,
    sample::{Index, select},
    test_runner::{RngAlgorithm, TestRng, TestRunner},
};
use safetensors::{Dtype, SafeTensors, serialize, tensor::TensorView};

/// How many damaged files are read with both the parser and the crate.
const MUTANTS: u32 = 20_000;

// ---- reading with the parser and the crate ----

/// Parses a whole file as a loader would.
fn parse_file(file: &[u8]) -> Result<TensorMap, ModelError> {
    let file_bytes = file.len() as u64;
    let header_bytes = match sniff(&file[..file.len().min(9)], file_bytes, true) {
        Sniff::Safetensors { header_bytes } => header_bytes,
        Sniff::Broken { error } => return Err(error),
        Sniff::Not { why } => panic!("a file named .safetensors was read as raw bytes: {why}"),
    };
    let first8 = file[..8].try_into().expect("a sniffed header should have a length prefix");
    assert_eq!(parse_prefix(first8, file_bytes), Ok(header_bytes));
    parse(&file[8..8 + usize::try_from(header_bytes).unwrap()], file_bytes)
}

/// Checks that the crate reads the same tensors and metadata from a file that the parser accepts.
fn check_agreement(map: &TensorMap, file: &[u8]) -> Result<(), TestCaseError> {
    let oracle =
        SafeTensors::deserialize(file).map_err(|error| TestCaseError::fail(format!("the crate refuses this file: {error}")))?;
    prop_assert_eq!(map.len(), oracle.len());
    for (name, view) in oracle.iter() {
        let info = map.get(name).expect("the parser should find every tensor that the crate finds");
        // The address of a tensor's slice shows where in the file the crate found the tensor.
        let begin = (view.data().as_ptr() as usize - file.as_ptr() as usize) as u64;
        prop_assert_eq!(&info.name, name);
        prop_assert_eq!(info.dtype.to_string(), format!("{:?}", view.dtype()));
        prop_assert_eq!(&info.shape, view.shape());
        prop_assert_eq!(&info.file_range, &(begin..begin + view.data().len() as u64));
    }
    let (header_bytes, metadata) = SafeTensors::read_metadata(file).unwrap();
    prop_assert_eq!(map.header_bytes(), header_bytes as u64);
    let theirs = metadata.metadata().clone().unwrap_or_default();
    let ours: HashMap<_, _> = map.metadata().iter().map(|(k, v)| (k.to_owned(), v.to_owned())).collect();
    prop_assert_eq!(map.metadata().len(), theirs.len());
    prop_assert_eq!(ours, theirs);
    Ok(())
}

/// Returns whether the parser may refuse a file with this error even though the crate accepts the
/// file.
#[expect(clippy::match_same_arms, reason = "each difference has its own reason")]
fn stricter_on_purpose(error: &ModelError) -> bool {
    match error {
        // The crate's README forbids duplicates, but the crate lets the last one win.
        ModelError::DuplicateTensor { .. } | ModelError::DuplicateMetadataKey { .. } => true,
        // The crate's derived deserializer also accepts an array for a struct, and an object for
        // an enum.
        ModelError::WrongType { key, .. } => matches!(key, None | Some("dtype")),
        // `RANK_LIMIT` is far above what models use. The crate has no limit.
        ModelError::RankTooLarge { .. } => true,
        _ => false,
    }
}

/// Whether the parser and the crate accept a file.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Verdict {
    BothAccept,
    BothRefuse,
    OnlyWeRefuse,
}

/// Reads a file with the parser and the crate. Fails if the parser is less strict than the crate,
/// or stricter without a known reason.
fn compare(file: &[u8]) -> Result<Verdict, TestCaseError> {
    match parse_file(file) {
        Ok(map) => check_agreement(&map, file).map(|()| Verdict::BothAccept),
        Err(error) => {
            prop_assert!(!error.to_string().is_empty());
            if SafeTensors::deserialize(file).is_err() {
                return Ok(Verdict::BothRefuse);
            }
            prop_assert!(stricter_on_purpose(&error), "only our parser refuses this file: {error:?}");
            Ok(Verdict::OnlyWeRefuse)
        }
    }
}

// ---- valid files ----

/// A tensor in a valid file.
#[derive(Debug, Clone)]
struct Tensor {
    dtype: Dtype,
    shape: Vec<usize>,
}

impl Tensor {
    fn bytes(&self) -> usize {
        self.shape.iter().product::<usize>() * self.dtype.bitsize() / 8
    }
}

/// Returns all dtypes of the crate. The crate has no list of them, so this function reads their
/// names from the error for an unknown dtype.
fn oracle_dtypes() -> Vec<Dtype> {
    let error = serde_json::from_str::<Dtype>("\"none\"").unwrap_err().to_string();
    let (_, expected) = error.split_once("expected one of").expect("the error should list the variants");
    let names = expected.split('`').skip(1).step_by(2);
    names.map(|name| serde_json::from_str(&format!("\"{name}\"")).unwrap()).collect()
}

fn any_tensor() -> impl Strategy<Value = Tensor> {
    (select(oracle_dtypes()), vec(0..5_usize, 0..4)).prop_map(|(dtype, mut shape)| {
        let elements: usize = shape.iter().product();
        if !(elements * dtype.bitsize()).is_multiple_of(8) {
            shape.push(4);
        }
        Tensor { dtype, shape }
    })
}

fn any_tensors() -> impl Strategy<Value = BTreeMap<String, Tensor>> {
    let name = prop_oneof![4 => "[a-d]{1,2}", 1 => any::<String>()].prop_filter("reserved", |name| name != "__metadata__");
    btree_map(name, any_tensor(), 0..6)
}

fn any_metadata() -> impl Strategy<Value = Option<BTreeMap<String, String>>> {
    let text = || prop_oneof!["[a-c]{0,2}", any::<String>()];
    option::of(btree_map(text(), text(), 0..3))
}

/// Returns a file that the crate wrote.
fn serialized(tensors: &BTreeMap<String, Tensor>, metadata: Option<BTreeMap<String, String>>) -> Vec<u8> {
    // Given no tensors and empty metadata, version 0.8 of the crate writes `{}"__metadata__":{}`,
    // which it then refuses to read.
    let metadata = metadata.filter(|pairs| !pairs.is_empty() || !tensors.is_empty());
    let data = vec![7; tensors.values().map(Tensor::bytes).max().unwrap_or(0)];
    let views = tensors.iter().map(|(name, tensor)| {
        let view = TensorView::new(tensor.dtype, tensor.shape.clone(), &data[..tensor.bytes()]);
        (name, view.expect("valid by construction"))
    });
    serialize(views, metadata.map(HashMap::from_iter)).expect("valid by construction")
}

/// How a hand-built header differs from what the `safetensors` crate writes.
#[derive(Debug, Clone)]
struct Style {
    /// Determines the order of the tensors' data.
    data_order: Vec<u32>,
    /// Determines the order of the tensors' entries in the header.
    entry_order: Vec<u32>,
    key_rotation: usize,
    padding: usize,
    whitespace: &'static str,
    metadata_first: bool,
    null_metadata: bool,
}

fn any_style() -> impl Strategy<Value = Style> {
    (
        (vec(any::<u32>(), 6), vec(any::<u32>(), 6), 0..3_usize),
        (0..20_usize, select(vec!["", " ", "\n\t", "\r\n"]), any::<bool>(), any::<bool>()),
    )
        .prop_map(|((data_order, entry_order, key_rotation), rest)| {
            let (padding, whitespace, metadata_first, null_metadata) = rest;
            Style { data_order, entry_order, key_rotation, padding, whitespace, metadata_first, null_metadata }
        })
}

fn quoted(text: &str) -> String {
    serde_json::to_string(text).unwrap()
}

/// Builds a file without the crate, with entries and keys in any order, unusual whitespace, and
/// padding.
fn hand_built(tensors: &BTreeMap<String, Tensor>, metadata: Option<&BTreeMap<String, String>>, style: &Style) -> Vec<u8> {
    let mut placed: Vec<_> = tensors.iter().zip(&style.data_order).collect();
    placed.sort_by_key(|&(_, order)| order);
    let mut end = 0;
    let mut entries = Vec::new();
    for (((name, tensor), _), order) in placed.into_iter().zip(&style.entry_order) {
        let begin = end;
        end += tensor.bytes();
        entries.push((order, entry(name, tensor, begin, end, style)));
    }
    entries.sort();
    let mut items: Vec<_> = entries.into_iter().map(|(_, entry)| entry).collect();
    if let Some(item) = metadata_item(metadata, style) {
        let at = if style.metadata_first { 0 } else { items.len() };
        items.insert(at, item);
    }
    let space = style.whitespace;
    let items = items.join(&format!("{space},{space}"));
    let header = format!("{{{space}{items}{space}}}{}", " ".repeat(style.padding));
    framed(&header, end)
}

fn entry(name: &str, tensor: &Tensor, begin: usize, end: usize, style: &Style) -> String {
    let space = style.whitespace;
    let mut keys = [
        format!("\"dtype\"{space}:{space}\"{:?}\"", tensor.dtype),
        format!("\"shape\":{space}{:?}", tensor.shape),
        format!("\"data_offsets\":[{space}{begin}{space},{end}]"),
    ];
    keys.rotate_left(style.key_rotation);
    format!("{}{space}:{{{space}{}{space}}}", quoted(name), keys.join(","))
}

fn metadata_item(metadata: Option<&BTreeMap<String, String>>, style: &Style) -> Option<String> {
    let pairs = match metadata {
        Some(metadata) => metadata.iter(),
        None => {
            return style.null_metadata.then(|| "\"__metadata__\":null".to_owned());
        }
    };
    let pairs: Vec<_> = pairs.map(|(key, value)| format!("{}:{}", quoted(key), quoted(value))).collect();
    Some(format!("\"__metadata__\":{{{}}}", pairs.join(",")))
}

/// Returns a file with this header and `data_bytes` bytes of data.
fn framed(header: &str, data_bytes: usize) -> Vec<u8> {
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(header.as_bytes());
    file.resize(file.len() + data_bytes, 7);
    file
}

fn any_file() -> impl Strategy<Value = Vec<u8>> {
    (any_tensors(), any_metadata(), option::of(any_style())).prop_map(|(tensors, metadata, style)| match style {
        Some(style) => hand_built(&tensors, metadata.as_ref(), &style),
        None => serialized(&tensors, metadata),
    })
}

#[test]
fn dtypes_match_those_of_the_crate() {
    let theirs = oracle_dtypes();
    assert_eq!(theirs.len(), DType::SAFETENSORS.len());
    for dtype in theirs {
        // This is the name that the crate writes into headers and reads from them.
        let name: String = serde_json::from_value(serde_json::to_value(dtype).unwrap()).unwrap();
        let ours: DType = name.parse().expect("the parser should know every dtype of the crate");
        assert_eq!(DType::try_from(name.as_str()), Ok(ours));
        assert_eq!((ours.name(), ours.to_string()), (name.as_str(), dtype.to_string()));
        assert_eq!(serde_json::from_str::<Dtype>(&format!("\"{ours}\"")).unwrap(), dtype);
        assert_eq!(ours.element_bits(), Some(dtype.bitsize()), "{ours}");
        let whole_bytes = dtype.bitsize().is_multiple_of(8).then_some(dtype.bitsize() / 8);
        assert_eq!(ours.element_bytes(), whole_bytes, "{ours}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn files_that_the_crate_writes_are_read_the_same(tensors in any_tensors(), metadata in any_metadata()) {
        let file = serialized(&tensors, metadata);
        prop_assert_eq!(compare(&file)?, Verdict::BothAccept);
    }

    #[test]
    fn any_other_valid_layout_is_read_the_same(
        tensors in any_tensors(),
        metadata in any_metadata(),
        style in any_style(),
    ) {
        let file = hand_built(&tensors, metadata.as_ref(), &style);
        prop_assert_eq!(compare(&file)?, Verdict::BothAccept);
    }

    #[test]
    fn no_input_makes_the_parser_panic(header in vec(any::<u8>(), 0..200), file_bytes in any::<u64>()) {
        let _ = parse(&header, file_bytes);
        let _ = sniff(&header, file_bytes, false);
        let braced = [b"{", &header[..]].concat();
        let _ = parse(&braced, file_bytes);
    }
}

// ---- damaged files ----

/// Damage to a valid file. Edits to the header also correct its length prefix, so that the JSON
/// parser sees them.
#[derive(Debug, Clone)]
enum Damage {
    FlipBit(Index, u8),
    SetByte(Index, u8),
    Truncate(Index),
    Extend(u8),
    Prefix(u64),
    CutFromHeader(Index, usize),
    InsertInHeader(Index, &'static str),
    EditNumber(Index, &'static str),
    StepNumber(Index, i64),
    SwapNumbers(Index, Index),
    RepeatMember(Index, Index),
    /// Makes a second tensor share a tensor's bytes.
    Alias(Index),
    SwapWords(&'static str, &'static str),
}

fn any_damage() -> impl Strategy<Value = Damage> {
    use Damage::*;
    let index = any::<Index>;
    let texts = vec![
        " ",
        "\n",
        ",",
        "{",
        "}",
        "[",
        "]",
        "\"",
        "0",
        "0,",
        "1,",
        ",1",
        "null",
        "-",
        ".0",
        "\\u0061",
        "\0",
        "\"x\":1,",
        "\"\":{},",
        "\"dtype\":\"U8\",",
        "\"shape\":[],",
        "\"__metadata__\":null,",
        "\"__metadata__\":{\"a\":\"b\"},",
        "\"e\":{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[0,0]},",
        "\"e\":[\"U8\",[0],[0,0]],",
        "\"e\":{\"dtype\":{\"U8\":null},\"shape\":[0],\"data_offsets\":[0,0]},",
    ];
    let numbers = vec![
        "0",
        "1",
        "2",
        "8",
        "16",
        "-1",
        "-0",
        "1.0",
        "1e0",
        "\"1\"",
        "null",
        "[]",
        "4294967296",
        "18446744073709551615",
        "18446744073709551616",
        "1e400",
        "00",
    ];
    let words = vec![
        "U8",
        "I8",
        "BOOL",
        "F4",
        "BF16",
        "F16",
        "F32",
        "I32",
        "C64",
        "u8",
        "shape",
        "dtype",
        "data_offsets",
        "[0,",
        "a",
        "b",
    ];
    prop_oneof![
        (index(), 0..8_u8).prop_map(|(at, bit)| FlipBit(at, bit)),
        (index(), any::<u8>()).prop_map(|(at, byte)| SetByte(at, byte)),
        index().prop_map(Truncate),
        (1..20_u8).prop_map(Extend),
        prop_oneof![0..300_u64, any::<u64>(), Just(100_000_001)].prop_map(Prefix),
        (index(), 1..10_usize).prop_map(|(at, n)| CutFromHeader(at, n)),
        (index(), select(texts)).prop_map(|(at, text)| InsertInHeader(at, text)),
        (index(), select(numbers)).prop_map(|(at, number)| EditNumber(at, number)),
        (index(), -3..4_i64).prop_map(|(at, step)| StepNumber(at, step)),
        (index(), index()).prop_map(|(a, b)| SwapNumbers(a, b)),
        (index(), index()).prop_map(|(from, to)| RepeatMember(from, to)),
        index().prop_map(Alias),
        (select(words.clone()), select(words)).prop_map(|(from, to)| SwapWords(from, to)),
    ]
}

impl Damage {
    fn apply(&self, file: &mut Vec<u8>) {
        match self {
            Self::FlipBit(at, bit) if !file.is_empty() => *at.get_mut(file) ^= 1 << bit,
            Self::SetByte(at, byte) if !file.is_empty() => *at.get_mut(file) = *byte,
            Self::Truncate(at) => file.truncate(at.index(file.len() + 1)),
            Self::Extend(count) => file.resize(file.len() + usize::from(*count), 0),
            Self::Prefix(length) if file.len() >= 8 => {
                file[..8].copy_from_slice(&length.to_le_bytes());
            }
            _ => self.apply_to_header(file),
        }
    }

    /// Damages the header, if the file still has one.
    fn apply_to_header(&self, file: &mut Vec<u8>) {
        let Some((prefix, rest)) = file.split_first_chunk() else {
            return;
        };
        let length = usize::try_from(u64::from_le_bytes(*prefix)).unwrap();
        let Some((header, data)) = rest.split_at_checked(length) else {
            return;
        };
        let Ok(mut header) = str::from_utf8(header).map(str::to_owned) else {
            return;
        };
        self.edit(&mut header);
        let data = data.to_vec();
        *file = framed(&header, 0);
        file.extend(data);
    }

    fn edit(&self, header: &mut String) {
        let numbers = find_numbers(header);
        match self {
            Self::CutFromHeader(at, count) => {
                let at = pick_boundary(header, *at);
                let end = header[at..].char_indices().nth(*count).map_or(header.len(), |(i, _)| at + i);
                header.replace_range(at..end, "");
            }
            // Insertions after a comma or an opening brace or bracket are the most likely to leave
            // valid JSON.
            Self::InsertInHeader(at, text) => header.insert_str(pick_joint(header, *at), text),
            Self::EditNumber(at, text) if !numbers.is_empty() => {
                header.replace_range(at.get(&numbers).clone(), text);
            }
            Self::StepNumber(at, step) if !numbers.is_empty() => {
                let range = at.get(&numbers).clone();
                if let Ok(number) = header[range.clone()].parse::<i64>() {
                    header.replace_range(range, &number.saturating_add(*step).to_string());
                }
            }
            Self::SwapNumbers(a, b) if !numbers.is_empty() => {
                let (a, b) = (a.get(&numbers).clone(), b.get(&numbers).clone());
                let (first, second) = if a.start <= b.start { (a, b) } else { (b, a) };
                let (one, other) = (header[first.clone()].to_owned(), header[second.clone()].to_owned());
                header.replace_range(second, &one);
                header.replace_range(first, &other);
            }
            Self::RepeatMember(from, to) => {
                let from = pick_joint(header, *from);
                let end = header[from..].find(['}', ']']).map_or(header.len(), |i| from + i + 1);
                let member = format!("{},", header[from..end].trim_end_matches(','));
                header.insert_str(pick_joint(header, *to), &member);
            }
            Self::Alias(at) => {
                let entries: Vec<_> = header.match_indices("{\"").map(|(i, _)| i).collect();
                let Some(from) = (!entries.is_empty()).then(|| at.get(&entries)) else {
                    return;
                };
                let end = header[*from..].find('}').map_or(header.len(), |i| from + i + 1);
                let alias = format!("\"alias\":{},", &header[*from..end]);
                header.insert_str(1.min(header.len()), &alias);
            }
            Self::SwapWords(from, to) => *header = header.replacen(from, to, 1),
            _ => {}
        }
    }
}

/// Finds the runs of digits in a header.
fn find_numbers(header: &str) -> Vec<std::ops::Range<usize>> {
    let mut runs: Vec<std::ops::Range<usize>> = Vec::new();
    for (at, _) in header.bytes().enumerate().filter(|(_, byte)| byte.is_ascii_digit()) {
        match runs.last_mut() {
            Some(run) if run.end == at => run.end += 1,
            _ => runs.push(at..at + 1),
        }
    }
    runs
}

/// Picks the last character boundary at or before a position.
fn pick_boundary(header: &str, at: Index) -> usize {
    (0..=at.index(header.len() + 1)).rev().find(|&i| header.is_char_boundary(i)).unwrap_or(0)
}

/// Picks a place after a comma or an opening brace or bracket. If there is none, picks any
/// character boundary.
fn pick_joint(header: &str, at: Index) -> usize {
    let joints: Vec<_> = header.match_indices([',', '{', '[']).map(|(i, _)| i + 1).collect();
    if joints.is_empty() { pick_boundary(header, at) } else { *at.get(&joints) }
}

#[test]
fn damaged_files_are_never_read_more_loosely_or_differently() {
    let config = ProptestConfig { cases: MUTANTS, failure_persistence: None, ..ProptestConfig::default() };
    // A fixed seed makes the counts below reproducible.
    let rng = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
    let counts = Cell::new([0_u32; 3]);
    TestRunner::new_with_rng(config, rng)
        .run(&(any_file(), vec(any_damage(), 1..3)), |(mut file, damages)| {
            for damage in &damages {
                damage.apply(&mut file);
            }
            let verdict = compare(&file)?;
            let mut now = counts.get();
            now[verdict as usize] += 1;
            counts.set(now);
            Ok(())
        })
        .unwrap();

    // The comparison is meaningful only if every verdict occurs.
    let [accepted, refused, stricter] = counts.get();
    println!("both accept {accepted}, both refuse {refused}, only we refuse {stricter}");
    assert!(accepted > MUTANTS / 20 && refused > MUTANTS / 4 && stricter > 0);
}

#[test]
fn each_known_difference_still_differs() {
    const EMPTY: &str = r#"{"dtype":"U8","shape":[0],"data_offsets":[0,0]}"#;
    let ones = vec!["1"; 256].join(",");
    let headers = [
        format!(r#"{{"t":{EMPTY},"t":{EMPTY}}}"#),
        r#"{"__metadata__":{"a":"1","a":"2"}}"#.to_owned(),
        r#"{"t":["U8",[0],[0,0]]}"#.to_owned(),
        r#"{"t":{"dtype":{"U8":null},"shape":[0],"data_offsets":[0,0]}}"#.to_owned(),
        format!(r#"{{"t":{{"dtype":"U8","shape":[0,{ones}],"data_offsets":[0,0]}}}}"#),
    ];
    for header in headers {
        assert_eq!(compare(&framed(&header, 0)).unwrap(), Verdict::OnlyWeRefuse, "{header}");
    }
}

/// The crate accepts these deviations from the format, although its README forbids some and does
/// not mention the others.
#[test]
fn harmless_deviations_that_the_crate_accepts_are_read() {
    let nested = |depth: usize| format!("{}{}", "[".repeat(depth), "]".repeat(depth));
    let entry = |more: &str| format!(r#"{{"t":{{"dtype":"U8","shape":[0],"data_offsets":[0,0],"more":{more}}}}}"#);
    let headers = [" {}".to_owned(), "{}\n".to_owned(), "\r\n{}\t ".to_owned(), entry("[1]"), entry(&nested(100))];
    for header in headers {
        assert_eq!(compare(&framed(&header, 0)).unwrap(), Verdict::BothAccept, "{header}");
    }
    for header in [entry("1e400"), entry(&nested(100_000)), entry("[1")] {
        assert_eq!(compare(&framed(&header, 0)).unwrap(), Verdict::BothRefuse, "{} bytes", header.len());
    }
}

// ---- size ----

#[test]
fn header_of_200_000_tensors_is_read_the_same() {
    const COUNT: usize = 200_000;
    let mut header = "{".to_owned();
    // The header lists the tensors in reverse order of their data, so the parser must sort them.
    for i in (0..COUNT).rev() {
        let (begin, end, comma) = (2 * i, 2 * i + 2, if i == 0 { "" } else { "," });
        write!(
            header,
            r#""model.layers.{}.experts.{i}.weight":{{"dtype":"F16","shape":[1,1],"data_offsets":[{begin},{end}]}}{comma}"#,
            i % 97,
        )
        .unwrap();
    }
    header.push('}');
    let file = framed(&header, 2 * COUNT);

    let start = Instant::now();
    let map = parse_file(&file).unwrap();
    let parsed = start.elapsed();
    assert!(map.iter().all(|tensor| map.get(&tensor.name) == Some(tensor)));
    println!("{} header bytes: parsed in {parsed:?}, with all look-ups {:?}", header.len(), start.elapsed());

    assert_eq!(map.len(), COUNT);
    assert!(map.iter().zip(map.iter().skip(1)).all(|(a, b)| a.file_range.end == b.file_range.start));
    check_agreement(&map, &file).unwrap();
    // This is far more than a slow machine needs in an unoptimized build, and far less than a
    // parser that takes quadratic time would need.
    assert!(parsed < Duration::from_mins(1), "{parsed:?}");
}
