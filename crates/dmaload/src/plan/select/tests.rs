use super::*;
use crate::model::{DType, safetensors};
use proptest::prelude::*;

const BLOCK: u64 = 4096;

/// An `owns` predicate for a file that owns every tensor.
fn all(_: &str) -> bool {
    true
}

/// Returns a map of consecutive BF16 tensors named `a`, `b`, and so on, and the length of their
/// file.
fn model(shapes: &[&[usize]]) -> (TensorMap, u64) {
    let (mut json, mut at) = (String::from("{"), 0);
    for (index, shape) in shapes.iter().enumerate() {
        let end = at + 2 * shape.iter().product::<usize>() as u64;
        let name = char::from(b'a' + u8::try_from(index).unwrap());
        let comma = if index == 0 { "" } else { "," };
        json += &format!(r#"{comma}"{name}":{{"dtype":"BF16","shape":{shape:?},"data_offsets":[{at},{end}]}}"#);
        at = end;
    }
    json.push('}');
    let bytes = 8 + json.len() as u64 + at;
    (safetensors::parse(json.as_bytes(), bytes).unwrap(), bytes)
}

fn tensors(patterns: &[&str]) -> Select {
    Select { tensors: Some(patterns.iter().map(|&pattern| pattern.to_owned()).collect()), ..Select::default() }
}

fn ranges(selected: &Selected) -> Vec<(Range<u64>, usize)> {
    selected.spans.iter().map(|span| (span.range.clone(), span.class)).collect()
}

#[test]
fn wanted_tensors_are_read_with_blocks_and_small_gaps() {
    let (map, bytes) = model(&[&[100], &[1 << 20], &[100], &[100]]);
    let at = |name: &str| map.get(name).unwrap().file_range.clone();
    let mut selector = Selector::new(&tensors(&["a", "d"])).unwrap();
    let selected = selector.select_file(Some(&map), all, &(0..bytes), bytes, BLOCK).unwrap();
    let d = at("d").start / BLOCK * BLOCK..bytes;
    assert_eq!(ranges(&selected), [(0..BLOCK, 0), (d, 1)]);
    assert_eq!(selected.wanted_bytes, 400);
    selector.check_all_matched().unwrap();
    let mut together = Selector::new(&tensors(&["[ac]", "{a,c}"])).unwrap();
    let selected = together.select_file(Some(&map), all, &(0..bytes), bytes, BLOCK).unwrap();
    // Two spans, because 2 MiB lie between them.
    assert_eq!(ranges(&selected).len(), 2);
    assert!(matches!(together.check_all_matched(), Err(Error::NoSuchTensor(unmatched)) if unmatched == "[ac]"));
    let close = Selector::new(&tensors(&["{c,d}"])).unwrap().select_file(Some(&map), all, &(0..bytes), bytes, BLOCK).unwrap();
    assert_eq!(ranges(&close), [(at("c").start / BLOCK * BLOCK..bytes, 0)]);
}

#[test]
fn tensors_requested_first_come_first() {
    let (map, bytes) = model(&[&[1 << 20], &[1 << 20], &[1 << 20]]);
    let selected = Selector::new(&tensors(&["c", "*"])).unwrap().select_file(Some(&map), all, &(0..bytes), bytes, BLOCK).unwrap();
    let order: Vec<_> = selected.tensors.as_ref().unwrap().list().iter().map(|chosen| (chosen.position, chosen.class)).collect();
    assert_eq!(order, [(2, 0), (0, 1), (1, 1)]);
    let starts: Vec<_> = ranges(&selected).iter().map(|(range, class)| (range.start > 0, *class)).collect();
    assert_eq!(starts, [(true, 0), (false, 1)]);
}

#[test]
fn ranks_together_cover_a_tensor() {
    let (map, bytes) = model(&[&[7, 6], &[5]]);
    for dim in [0, 1, 2] {
        let mut seen = Vec::new();
        for rank in 0..4 {
            let select = Select { shard: Some(Shard { rank, world_size: 4, dim: Some(dim) }), ..Select::default() };
            let selected = Selector::new(&select).unwrap().select_file(Some(&map), all, &(0..bytes), bytes, BLOCK).unwrap();
            let a = &selected.tensors.as_ref().unwrap().list()[0];
            assert_eq!(a.part.rows.bytes(), 2 * a.part.shape.iter().product::<usize>() as u64);
            seen.extend(a.part.rows.iter().flatten());
            // All ranks get the whole of a tensor that lacks the dimension.
            let b = &selected.tensors.as_ref().unwrap().list()[1];
            assert!(dim == 0 || b.part.shape == [5]);
        }
        seen.sort_unstable();
        let all = map.get("a").unwrap().file_range.clone();
        if dim < 2 {
            assert!(seen.iter().copied().eq(all), "along dimension {dim}, the ranks together should get each byte exactly once");
        } else {
            assert_eq!(seen.len(), 4 * 84);
        }
    }
    let whole = Select { shard: Some(Shard { rank: 0, world_size: 1, dim: Some(1) }), ..Select::default() };
    let selected = Selector::new(&whole).unwrap().select_file(Some(&map), all, &(0..bytes), bytes, BLOCK).unwrap();
    assert_eq!(
        selected.tensors.unwrap().list()[0].part.rows.count,
        1,
        "a part that is the whole tensor should be a single range"
    );
}

#[test]
fn part_never_splits_a_quantized_block() {
    let tensor = |shape: &[usize]| TensorInfo { name: "q".into(), dtype: DType::Q4_0, shape: shape.to_vec(), file_range: 0..72 };
    let part = |shape: &[usize], dim| rank_slice(&tensor(shape), Some(Shard { rank: 1, world_size: 2, dim: Some(dim) }));
    assert_eq!(part(&[2, 64], 0).unwrap().rows, Rows::single(36..72));
    assert_eq!(part(&[2, 64], 1).unwrap().rows, Rows { first: 18..36, stride_bytes: 36, count: 2 });
    assert!(part(&[4, 32], 1).unwrap_err().contains("a block of Q4_0"));
    // The dimensions of an empty tensor are not multiplied, because the product of those that are
    // not zero may overflow.
    let empty = TensorInfo { name: "e".into(), dtype: DType::U8, shape: vec![0, usize::MAX, usize::MAX], file_range: 7..7 };
    for dim in 0..3 {
        assert_eq!(rank_slice(&empty, Some(Shard { rank: 1, world_size: 2, dim: Some(dim) })).unwrap().rows, Rows::single(7..7));
    }
}

#[test]
fn files_are_cut_at_block_boundaries() {
    let mut at = 0;
    for rank in 0..3 {
        let select = Select { shard: Some(Shard { rank, world_size: 3, dim: None }), ..Select::default() };
        let selected = Selector::new(&select).unwrap().select_file(None, all, &(0..100_001), 100_001, BLOCK).unwrap();
        let span = &selected.spans[0].range;
        assert_eq!((span.start, span.start % BLOCK), (at, 0));
        assert_eq!(selected.wanted_bytes, span.end - span.start);
        at = span.end;
    }
    assert_eq!(at, 100_001);
}

#[test]
fn invalid_selections_are_refused() {
    let shard = |rank, world_size, dim| Some(Shard { rank, world_size, dim });
    let says = |select: Select| Selector::new(&select).unwrap_err().to_string();
    assert!(says(Select { shard: shard(2, 2, None), ..Select::default() }).contains("invalid rank 2 of 2"));
    assert!(says(Select { shard: shard(0, 0, None), ..Select::default() }).contains("invalid rank 0 of 0"));
    assert!(says(Select { shard: shard(0, 2, None), ..tensors(&["a"]) }).contains("needs the dimension"));
    assert!(says(Select { range: Some(0..1), ..tensors(&["a"]) }).contains("combined"));
    assert!(says(Select { range: Some(1..1), ..Select::default() }).contains("range is empty"));
    assert!(says(tensors(&[])).contains("list of tensors is empty"));
    assert!(says(tensors(&["{"])).contains("invalid pattern"));
    let mut range = Selector::new(&Select { range: Some(5..9), ..Select::default() }).unwrap();
    assert!(range.select_file(None, all, &(0..8), 8, BLOCK).unwrap_err().contains("it has 8"));
    assert!(
        Selector::new(&tensors(&["a"])).unwrap().select_file(None, all, &(0..8), 8, BLOCK).unwrap_err().contains("no tensors")
    );
}

proptest! {
    #[test]
    fn spans_hold_every_wanted_byte_once_per_class(
        lens in proptest::collection::vec(0usize..300_000, 1..20),
        picks in proptest::collection::vec(0usize..20, 1..6),
        rank in 0u32..3,
        dim in proptest::option::of(0usize..2),
    ) {
        let shapes: Vec<Vec<usize>> = lens.iter().map(|&len| vec![len / 7, 7]).collect();
        let shapes: Vec<&[usize]> = shapes.iter().map(Vec::as_slice).collect();
        let (map, bytes) = model(&shapes);
        let names: Vec<String> = picks.iter().map(|pick| char::from(b'a' + u8::try_from(pick % lens.len()).unwrap()).to_string()).collect();
        let shard = dim.map(|dim| Shard { rank, world_size: 3, dim: Some(dim) });
        let select = Select { tensors: Some(names), shard, range: None, by_name: false };
        let selected = Selector::new(&select).unwrap().select_file(Some(&map), all, &(0..bytes), bytes, BLOCK).unwrap();
        for pair in selected.spans.windows(2) {
            prop_assert!(pair[0].class < pair[1].class || pair[0].range.end < pair[1].range.start);
        }
        for span in &selected.spans {
            prop_assert!(span.range.start % BLOCK == 0 && (span.range.end % BLOCK == 0 || span.range.end == bytes));
            prop_assert!(span.range.end <= bytes && !span.range.is_empty());
        }
        for chosen in selected.tensors.iter().flat_map(|tensors| tensors.list()) {
            prop_assert_eq!(selected.tensors.as_ref().unwrap().get(chosen.position), Some(chosen));
            let held = |row: &Range<u64>| selected.spans.iter().any(|span| span.class == chosen.class && span.range.start <= row.start && row.end <= span.range.end);
            prop_assert!(chosen.part.rows.iter().all(|row| row.is_empty() || held(&row)));
        }
        let most = 1 << 17;
        let apart = tensor_spans(&selected, &map, bytes, BLOCK, most, most, ImporterLimits::default()).unwrap();
        for alignment in [1u64, 64, 4096, 1 << 16] {
            let importer = ImporterLimits { alignment_bytes: alignment, ..ImporterLimits::default() };
            let Ok(spans) = tensor_spans(&selected, &map, bytes, BLOCK, most, most, importer) else { continue };
            for chosen in selected.tensors.iter().flat_map(|tensors| tensors.list()) {
                let hull = chosen.part.rows.hull();
                // The tensor's offset in its memory. The memory begins with the span or, if a
                // range of the file is moved to the beginning, with that range.
                let place = |span: &Span| hull.start - span.moved.as_ref().map_or(span.range.start, |moved| moved.start);
                let holds = |span: &&Span| span.class == chosen.class && span.moved.as_ref().map_or(span.range.start <= hull.start && hull.end <= span.range.end, |moved| *moved == hull);
                prop_assert!(hull.is_empty() || spans.iter().filter(holds).any(|span| place(span).is_multiple_of(alignment)));
            }
            let refused = tensor_spans(&selected, &map, bytes, BLOCK, most, most, ImporterLimits { may_copy: false, ..importer });
            prop_assert_eq!(refused.is_err(), spans.iter().any(|span| span.moved.is_some()));
        }
        let hulls = || selected.tensors.iter().flat_map(|tensors| tensors.list()).map(|chosen| chosen.part.rows.hull()).filter(|hull| !hull.is_empty());
        let out = |hull: &Range<u64>| hull.start / BLOCK * BLOCK..hull.end.next_multiple_of(BLOCK).min(bytes);
        for span in &apart {
            let long = span.range.end - span.range.start > most;
            prop_assert!(!long || hulls().any(|hull| out(&hull) == span.range), "a span longer than the limit must hold only one tensor");
        }
        for hull in hulls() {
            prop_assert!(apart.iter().any(|span| span.range.start <= hull.start && hull.end <= span.range.end));
        }
    }
}
