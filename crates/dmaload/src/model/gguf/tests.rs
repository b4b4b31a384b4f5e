use super::*;

fn text(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat()
}

/// A key-value pair, as encoded in a file.
fn pair(key: &str, kind: u32, value: &[u8]) -> Vec<u8> {
    [&text(key), &kind.to_le_bytes()[..], value].concat()
}

fn entry(name: &str, dims: &[u64], kind: u32, offset: u64) -> Vec<u8> {
    let dims: Vec<u8> = dims.iter().flat_map(|dim| dim.to_le_bytes()).collect();
    let rank = u32::try_from(dims.len() / 8).unwrap();
    [&text(name), &rank.to_le_bytes()[..], &dims, &kind.to_le_bytes(), &offset.to_le_bytes()].concat()
}

fn file(version: u32, pairs: &[Vec<u8>], tensors: &[Vec<u8>], data_bytes: usize) -> Vec<u8> {
    let counts = [tensors.len() as u64, pairs.len() as u64];
    let mut file = [&MAGIC[..], &version.to_le_bytes()].concat();
    counts.iter().for_each(|count| file.extend(count.to_le_bytes()));
    pairs.iter().chain(tensors).for_each(|part| file.extend(part));
    file.resize(file.len().next_multiple_of(32) + data_bytes, 7);
    file
}

fn good() -> Vec<u8> {
    let strings = [&8u32.to_le_bytes()[..], &2u64.to_le_bytes(), &text("a"), &text("bc")].concat();
    let nested = [&9u32.to_le_bytes()[..], &1u64.to_le_bytes(), &0u32.to_le_bytes(), &3u64.to_le_bytes(), &[1, 2, 3]].concat();
    let pairs = [
        pair("general.architecture", 8, &text("llama")),
        pair("general.alignment", 4, &32u32.to_le_bytes()),
        pair("tokens", 9, &strings),
        pair("nested", 9, &nested),
        pair("scale", 6, &0.5f32.to_le_bytes()),
        pair("flag", 7, &[1]),
    ];
    // 2 rows of 2 blocks of 18 bytes, then padding from 72 to 96.
    let tensors = [entry("q", &[64, 2], 2, 0), entry("n", &[3], 0, 96), entry("scalar", &[], 24, 128)];
    file(3, &pairs, &tensors, 129)
}

fn map(file: &[u8]) -> TensorMap {
    match parse(file, file.len() as u64) {
        Ok(Parsed::Complete(map)) => map,
        other => panic!("{other:?}"),
    }
}

fn fault(file: &[u8]) -> String {
    parse(file, file.len() as u64).unwrap_err().to_string()
}

#[test]
fn tensors_have_ranges_and_row_major_shapes() {
    let file = good();
    let map = map(&file);
    let begin = file.len() as u64 - 129;
    let seen: Vec<_> = map.iter().map(|t| (t.name.as_str(), t.dtype, t.shape.clone(), t.file_range.clone())).collect();
    assert_eq!(
        seen,
        [
            ("q", DType::Q4_0, vec![2, 64], begin..begin + 72),
            ("n", DType::F32, vec![3], begin + 96..begin + 108),
            ("scalar", DType::I8, vec![], begin + 128..begin + 129),
        ]
    );
    assert_eq!((map.format(), map.header_bytes()), ("gguf", begin));
}

#[test]
fn values_are_decoded_on_access() {
    let map = map(&good());
    let metadata = map.gguf().unwrap();
    assert_eq!((metadata.version(), metadata.len()), (3, 6));
    assert_eq!(metadata.get("general.architecture"), Some(Value::String("llama".into())));
    assert_eq!(metadata.get("scale"), Some(Value::F32(0.5)));
    assert_eq!(metadata.get("flag"), Some(Value::Bool(true)));
    assert_eq!(metadata.get("missing"), None);
    let Some(Value::Array(tokens)) = metadata.get("tokens") else { panic!() };
    assert_eq!(tokens.iter().map(|token| token.to_string()).collect::<Vec<_>>(), ["a", "bc"]);
    let Some(Value::Array(nested)) = metadata.get("nested") else { panic!() };
    let Some(Value::Array(inner)) = nested.iter().next() else { panic!() };
    assert_eq!(inner.iter().filter_map(|value| value.as_u64()).collect::<Vec<_>>(), [1, 2, 3]);
    let shown: Vec<_> = metadata.iter().map(|(key, value)| format!("{key}={value}")).collect();
    assert_eq!(shown[2..4], ["tokens=2 values of type String", "nested=1 values of type Array"]);
}

#[test]
fn partial_header_requests_more_bytes() {
    let file = good();
    let header_end = file.len() - 129 - 20;
    let mut have = 0;
    let mut steps = 0;
    while let Ok(Parsed::More { bytes }) = parse(&file[..have], file.len() as u64) {
        assert!(bytes > have as u64 && bytes <= file.len() as u64, "{bytes}");
        have = usize::try_from(bytes).unwrap();
        steps += 1;
    }
    assert!(have <= file.len() - 129 && have > header_end, "{have} of {}", file.len());
    assert!(steps > 20);
    assert_eq!(parse(&file[..have], file.len() as u64), Ok(Parsed::Complete(map(&file))));
}

#[test]
fn violations_of_the_format_are_reported() {
    let one = |tensor: Vec<u8>| fault(&file(3, &[], &[tensor], 1024));
    assert!(fault(b"GGUF\x01\0\0\0").contains("version 1"));
    assert!(fault(b"GGUF\0\0\0\x03").contains("big-endian"));
    assert!(fault(&file(3, &[pair("a", 13, &[])], &[], 0)).contains("unknown type 13"));
    assert!(fault(&file(3, &[pair("a", 7, &[0]), pair("a", 7, &[0])], &[], 0)).contains("duplicate key \"a\""));
    assert!(fault(&file(3, &[pair("general.alignment", 4, &48u32.to_le_bytes())], &[], 0)).contains("power of two"));
    assert!(one(entry("t", &[64], 2, 16)).contains("not a multiple of 32"));
    assert!(one(entry("t", &[63], 2, 0)).contains("blocks of 32"));
    for removed in [4, 5, 31, 32, 33, 36, 37, 38] {
        assert!(one(entry("t", &[256], removed, 0)).contains("no longer part of GGUF"), "{removed}");
    }
    for newer in [43, 44, 137, u32::MAX] {
        assert!(one(entry("t", &[256], newer, 0)).contains("newer than this version of dmaload"), "{newer}");
    }
    assert!(one(entry("t", &[1; 9], 0, 0)).contains("9 dimensions"));
    assert!(one(entry("t", &[u64::MAX, 2], 0, 0)).contains("larger than any file"));
    assert!(one(entry("t", &[u64::MAX, 0, 2], 0, 0)).contains("larger than any file"));
    assert!(one(entry("t", &[1], 0, 32)).contains("must begin at byte 0"));
    assert!(one(entry("t", &[1 << 20], 0, 0)).contains("cut short"));
    let twice = [entry("t", &[8], 0, 0), entry("t", &[8], 0, 32)];
    assert!(fault(&file(3, &[], &twice, 64)).contains("\"t\""));
    let overlapping = [entry("a", &[16], 0, 0), entry("b", &[8], 0, 32)];
    assert!(fault(&file(3, &[], &overlapping, 64)).contains("must begin at byte 64"));
}

#[test]
fn excessive_counts_and_nesting_are_refused() {
    let mut file = [&MAGIC[..], &3u32.to_le_bytes()].concat();
    file.extend(u64::MAX.to_le_bytes());
    file.extend(u64::MAX.to_le_bytes());
    assert!(fault(&file).contains("past the end of the file"));
    let array = [&8u32.to_le_bytes()[..], &u64::MAX.to_le_bytes()].concat();
    assert!(fault(&self::file(2, &[pair("a", 9, &array)], &[], 0)).contains("past the end of the file"));
    let array = [&10u32.to_le_bytes()[..], &u64::MAX.to_le_bytes()].concat();
    assert!(fault(&self::file(2, &[pair("a", 9, &array)], &[], 0)).contains("an array of"));
    let mut deep = vec![];
    (0..9).for_each(|_| deep.extend([&9u32.to_le_bytes()[..], &1u64.to_le_bytes()].concat()));
    assert!(fault(&self::file(2, &[pair("a", 9, &deep)], &[], 64)).contains("arrays are nested"));
    // The innermost array may contain anything but arrays.
    for (kind, value) in [(0_u32, &[7_u8][..]), (8, &[1, 0, 0, 0, 0, 0, 0, 0, b'x'])] {
        let inner = [&kind.to_le_bytes()[..], &1u64.to_le_bytes(), value].concat();
        let four = [&9u32.to_le_bytes()[..], &1u64.to_le_bytes()].concat().repeat(4);
        let file = self::file(2, &[pair("a", 9, &[four, inner].concat())], &[], 64);
        assert!(parse(&file, file.len() as u64).is_ok(), "type {kind}");
    }
}

proptest::proptest! {
    #[test]
    fn damaged_file_is_refused_or_consistent(at in 0usize..600, byte: u8, cut in 0usize..700, padding in 0usize..200) {
        let mut file = good();
        let len = file.len();
        file[at % len] = byte;
        file.truncate(len.min(cut.max(8)));
        file.resize(file.len() + padding, 0);
        let file_bytes = file.len() as u64;
        if let Ok(Parsed::Complete(map)) = parse(&file, file_bytes) {
            let mut end = map.header_bytes();
            for tensor in &map {
                assert!(tensor.file_range.start >= end && tensor.file_range.end <= file_bytes, "{tensor:?}");
                end = tensor.file_range.end;
            }
            if let Some(metadata) = map.gguf() {
                metadata.iter().for_each(|(key, value)| assert!(format!("{key}{value}").len() < 10_000));
            }
        }
    }
}

#[test]
fn nvfp4_q1_0_and_q2_0_have_the_right_sizes() {
    for (kind, dtype, elements, bytes) in [(40, DType::NVFP4, 64, 36), (41, DType::Q1_0, 128, 18), (42, DType::Q2_0, 64, 18)] {
        let whole = file(3, &[], &[entry("t", &[elements * 3, 2], kind, 0)], 6 * bytes);
        let map = map(&whole);
        let tensor = map.get("t").unwrap();
        assert_eq!((tensor.dtype, tensor.file_range.end - tensor.file_range.start), (dtype, 6 * bytes as u64));
        assert!(fault(&file(3, &[], &[entry("t", &[elements / 2], kind, 0)], 6 * bytes)).contains("blocks of"));
        assert_eq!(dtype.name().parse(), Ok(dtype));
    }
}
