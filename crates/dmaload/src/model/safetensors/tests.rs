//! Tests for valid headers, format detection, and each kind of fault.

use super::*;
use crate::model::DType;

/// Parses a header that is followed by `data_bytes` bytes of data.
fn parse_with(json: impl AsRef<[u8]>, data_bytes: u64) -> Result<TensorMap, ModelError> {
    let json = json.as_ref();
    parse(json, 8 + json.len() as u64 + data_bytes)
}

/// Parses a faulty header that is followed by 16 bytes of data, and returns the error.
#[track_caller]
fn refused(json: impl AsRef<[u8]>) -> ModelError {
    parse_with(json, 16).expect_err("a faulty header should be refused")
}

/// Returns a header whose only tensor is "t", with this entry.
fn one(entry: &str) -> String {
    format!(r#"{{"t":{{{entry}}}}}"#)
}

/// Returns a header whose only tensor is "t", with this type, shape and offsets.
fn tensor(dtype: &str, shape: &str, offsets: &str) -> String {
    one(&format!(r#""dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}"#))
}

/// Returns a header that lists U8 tensors with these names and offsets.
fn bytes(tensors: &[(&str, u64, u64)]) -> String {
    let entries: Vec<_> = tensors
        .iter()
        .map(|(name, begin, end)| {
            format!(r#""{name}":{{"dtype":"U8","shape":[{}],"data_offsets":[{begin},{end}]}}"#, end - begin)
        })
        .collect();
    format!("{{{}}}", entries.join(","))
}

fn t() -> String {
    "t".to_owned()
}

mod valid_headers {
    use super::*;

    #[test]
    fn tensor_gets_its_range_in_the_file() {
        let json = tensor("BF16", "[2,4]", "[0,16]");
        let map = parse_with(&json, 16).unwrap();
        let begin = 8 + json.len() as u64;
        let expected = TensorInfo { name: t(), dtype: DType::BF16, shape: vec![2, 4], file_range: begin..begin + 16 };
        assert_eq!(map.get("t"), Some(&expected));
        assert_eq!(map.header_bytes(), json.len() as u64);
        assert!(map.metadata().is_empty());
    }

    #[test]
    fn header_without_tensors_is_valid() {
        assert!(parse_with("{}", 0).unwrap().is_empty());
    }

    #[test]
    fn padding_and_inner_whitespace_are_accepted() {
        for json in ["{}        ", "{ \n\t\r}  ", "{}\n", "{} \t \r\n", " {}", "\n\t{}\n"] {
            let map = parse_with(json, 0).unwrap();
            assert_eq!(map.header_bytes(), json.len() as u64);
        }
    }

    #[test]
    fn tensors_can_be_in_any_order_and_empty_ones_anywhere() {
        let json = bytes(&[("last", 8, 16), ("b", 8, 8), ("first", 0, 8), ("a", 8, 8), ("end", 16, 16)]);
        let map = parse_with(json, 16).unwrap();
        let names: Vec<_> = map.iter().map(|t| t.name.as_str()).collect();
        assert_eq!(names, ["first", "a", "b", "last", "end"]);
    }

    #[test]
    fn scalars_empty_tensors_and_sub_byte_types_are_accepted() {
        assert!(parse_with(tensor("F64", "[]", "[0,8]"), 8).is_ok());
        assert!(parse_with(tensor("F64", "[3,0,2]", "[0,0]"), 0).is_ok());
        assert!(parse_with(tensor("F4", "[3,2]", "[0,3]"), 3).is_ok());
        assert!(parse_with(tensor("F6_E2M3", "[4]", "[0,3]"), 3).is_ok());
    }

    #[test]
    fn keys_of_an_entry_can_be_in_any_order_and_escaped() {
        let json = one(r#""data_offsets":[0,4],"sh\u0061pe":[1],"dtype":"F\u00332""#);
        assert_eq!(parse_with(json, 4).unwrap().get("t").unwrap().dtype, DType::F32);
    }

    #[test]
    fn names_can_be_empty_or_escaped() {
        let map = parse_with(bytes(&[("", 0, 1), (r"\u00e4\n", 1, 2)]), 2).unwrap();
        assert!(map.get("").is_some() && map.get("ä\n").is_some());
    }

    #[test]
    fn metadata_keeps_the_order_of_the_header() {
        let map = parse_with(r#"{"__metadata__":{"z":"1","a\u0062":"","c":"\"{"}}"#, 0).unwrap();
        let pairs: Vec<_> = map.metadata().iter().collect();
        assert_eq!(pairs, [("z", "1"), ("ab", ""), ("c", "\"{")]);
        assert_eq!(map.metadata().get("c"), Some("\"{"));
    }

    #[test]
    fn null_metadata_is_accepted_and_differs_from_an_empty_object() {
        for (json, present) in [(r#"{"__metadata__":null}"#, false), ("{}", false), (r#"{"__metadata__":{}}"#, true)] {
            let map = parse_with(json, 0).unwrap();
            assert!(map.metadata().is_empty(), "{json}");
            assert_eq!(map.metadata().is_present(), present, "{json}");
        }
    }

    #[test]
    fn shape_at_the_rank_limit_is_accepted() {
        let ones = vec!["1"; RANK_LIMIT].join(",");
        assert!(parse_with(tensor("U8", &format!("[{ones}]"), "[0,1]"), 1).is_ok());
    }
}

mod length_prefix {
    use super::*;

    #[test]
    fn header_length_is_checked_at_its_bounds() {
        let file = 8 + HEADER_LIMIT_BYTES;
        assert_eq!(parse_prefix(2_u64.to_le_bytes(), 10), Ok(2));
        assert_eq!(parse_prefix(HEADER_LIMIT_BYTES.to_le_bytes(), file), Ok(HEADER_LIMIT_BYTES));
        for header_bytes in [0, 1] {
            let error = ModelError::HeaderTooSmall { header_bytes };
            assert_eq!(parse_prefix(header_bytes.to_le_bytes(), file), Err(error));
        }
        for header_bytes in [HEADER_LIMIT_BYTES + 1, u64::MAX - 7, u64::MAX] {
            let error = ModelError::HeaderTooLarge { header_bytes };
            assert_eq!(parse_prefix(header_bytes.to_le_bytes(), u64::MAX), Err(error));
        }
        for file_bytes in [0, 8, 107] {
            let error = ModelError::HeaderPastEnd { header_bytes: 100, file_bytes };
            assert_eq!(parse_prefix(100_u64.to_le_bytes(), file_bytes), Err(error));
        }
        assert_eq!(parse_prefix(100_u64.to_le_bytes(), 108), Ok(100));
    }

    #[test]
    fn parse_checks_the_header_length_too() {
        assert_eq!(parse(b"", 100), Err(ModelError::HeaderTooSmall { header_bytes: 0 }));
        let error = ModelError::HeaderPastEnd { header_bytes: 2, file_bytes: 9 };
        assert_eq!(parse(b"{}", 9), Err(error));
    }
}

mod sniffing {
    use super::*;

    fn first(header_bytes: u64, ninth: u8) -> Vec<u8> {
        [&header_bytes.to_le_bytes()[..], &[ninth, b'}']].concat()
    }

    #[test]
    fn file_that_looks_like_safetensors_is_accepted() {
        for named in [false, true] {
            assert_eq!(sniff(&first(2, b'{'), 10, named), Sniff::Safetensors { header_bytes: 2 });
            assert_eq!(sniff(&first(2, b'{')[..9], 10, named), Sniff::Safetensors { header_bytes: 2 });
        }
    }

    #[test]
    fn truncated_header_is_never_a_raw_file() {
        let error = ModelError::HeaderPastEnd { header_bytes: 100, file_bytes: 107 };
        for named in [false, true] {
            assert_eq!(sniff(&first(100, b'{'), 107, named), Sniff::Broken { error: error.clone() });
        }
    }

    #[test]
    fn other_files_are_raw_unless_named_safetensors() {
        let cases = [
            (first(2, b'['), 10, ModelError::NotAnObject { found: b'[' }),
            (first(1, b'{'), 10, ModelError::HeaderTooSmall { header_bytes: 1 }),
            (first(u64::MAX, b'{'), 10, ModelError::HeaderTooLarge { header_bytes: u64::MAX }),
            (vec![], 0, ModelError::FileTooShort { file_bytes: 0 }),
            (first(2, b'{')[..9].to_vec(), 9, ModelError::FileTooShort { file_bytes: 9 }),
        ];
        for (first, file_bytes, why) in cases {
            assert_eq!(sniff(&first, file_bytes, false), Sniff::Not { why: why.clone() });
            assert_eq!(sniff(&first, file_bytes, true), Sniff::Broken { error: why });
        }
    }

    #[test]
    fn too_few_bytes_do_not_make_a_file_raw() {
        let error = ModelError::StartTooShort { given: 8 };
        assert_eq!(sniff(&[0; 8], 10, false), Sniff::Broken { error });
    }
}

mod text_faults {
    use super::*;

    #[test]
    fn header_without_an_opening_brace_is_refused() {
        for (json, found) in [(" []", b'['), ("[]", b'['), ("\u{feff}{}", 0xef)] {
            assert_eq!(refused(json), ModelError::NotAnObject { found });
        }
    }

    #[test]
    fn header_that_is_not_utf8_is_refused() {
        assert_eq!(refused(b"{\"\xff\":1}"), ModelError::InvalidUtf8 { offset: 2 });
        assert_eq!(refused(b"{\"\xed\xa0\x80\":1}"), ModelError::InvalidUtf8 { offset: 2 });
    }

    #[test]
    fn header_that_is_not_json_is_refused() {
        for (json, at) in [
            ("{]", 2),
            ("{\"t\"", 4),
            ("{\"t\":\n\n]", 8),
            (r#"{"\ud800":1}"#, 9),
            ("{\"a\nb\":1}", 4),
            (r#"{"t":{"dtype":"U8","shape":[1,],"data_offsets":[0,1]}}"#, 31),
            (r#"{"t":{"dtype":"U8","shape":[01],"data_offsets":[0,1]}}"#, 30),
            (r#"{"t":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},}"#, 54),
        ] {
            match refused(json) {
                ModelError::NotJson { offset, .. } => assert_eq!(offset, at, "{json}"),
                other => panic!("{json}: {other:?}"),
            }
        }
    }

    #[test]
    fn bytes_after_the_json_are_refused() {
        for (json, offset, found) in [("{}\0\0", 2, 0), ("{}  {}", 4, b'{'), ("{\n}\n x", 5, b'x')] {
            let error = ModelError::BytesAfterJson { offset, found };
            assert_eq!(refused(json), error, "{json:?}");
        }
    }

    #[test]
    fn deep_nesting_is_refused_early() {
        let deep = "[".repeat(1_000_000);
        for json in [format!("{{\"t\":{deep}"), one(&format!("\"shape\":[{deep}")), one(&format!("\"dtype\":{deep}"))] {
            match refused(json) {
                ModelError::WrongType { tensor, offset, .. } => {
                    assert!(tensor == "t" && offset < 50);
                }
                other => panic!("{other:?}"),
            }
        }
        let objects = "{\"a\":".repeat(1_000_000);
        // The value of an unknown key is skipped, unless it nests deeper than serde_json allows.
        assert!(matches!(refused(format!("{{\"t\":{objects}")), ModelError::NotJson { .. }));
        let metadata = format!("{{\"__metadata__\":{{\"a\":{deep}");
        assert!(matches!(refused(metadata), ModelError::MetadataNotString { .. }));
    }
}

mod key_faults {
    use super::*;

    const WHOLE: &str = r#""dtype":"U8","shape":[16],"data_offsets":[0,16]"#;

    #[test]
    fn missing_key_is_refused() {
        for (entry, key) in [
            (r#""shape":[16],"data_offsets":[0,16]"#, "dtype"),
            (r#""dtype":"U8","data_offsets":[0,16]"#, "shape"),
            (r#""dtype":"U8","shape":[16]"#, "data_offsets"),
        ] {
            assert_eq!(refused(one(entry)), ModelError::MissingKey { tensor: t(), key });
        }
    }

    #[test]
    fn unknown_key_is_skipped() {
        for key in ["strides", "Shape", ""] {
            for value in ["1", r#"{"dtype":"F32","data_offsets":[[[0,1]]]}"#] {
                let map = parse_with(one(&format!(r#"{WHOLE},"{key}":{value}"#)), 16).unwrap();
                assert_eq!(map.get("t").unwrap().shape, [16]);
            }
        }
    }

    #[test]
    fn duplicate_key_is_refused_even_with_the_same_value() {
        for (key, duplicate) in
            [("dtype", r#""dtype":"U8""#), ("shape", r#""sh\u0061pe":[16]"#), ("data_offsets", r#""data_offsets":[0,16]"#)]
        {
            let error = refused(one(&format!("{WHOLE},{duplicate}")));
            assert_eq!(error, ModelError::DuplicateKey { tensor: t(), key });
        }
    }

    #[test]
    fn duplicate_tensor_is_refused_even_if_escaped_or_empty() {
        for json in [
            bytes(&[("t", 0, 8), ("t", 8, 16)]),
            bytes(&[("t", 0, 16), ("t", 0, 16)]),
            bytes(&[("t", 0, 16), ("a", 16, 16), (r"\u0074", 16, 16)]),
        ] {
            assert_eq!(refused(json), ModelError::DuplicateTensor { tensor: t() });
        }
    }

    #[test]
    fn duplicate_metadata_is_refused() {
        for json in [r#"{"__metadata__":{},"__metadata__":{}}"#, r#"{"__metadata__":null,"__metadat\u0061__":null}"#] {
            assert_eq!(refused(json), ModelError::DuplicateMetadata);
        }
        let json = r#"{"__metadata__":{"a":"1","b":"2","\u0061":"1"}}"#;
        assert_eq!(refused(json), ModelError::DuplicateMetadataKey { key: "a".into() });
    }
}

mod value_faults {
    use super::*;

    #[test]
    fn value_of_the_wrong_type_is_refused() {
        for (json, key) in [
            (r#"{"t":1}"#.to_owned(), None),
            (r#"{"t":null}"#.to_owned(), None),
            (r#"{"t":["U8",[16],[0,16]]}"#.to_owned(), None),
            (one(r#""dtype":8"#), Some("dtype")),
            (one(r#""dtype":{"U8":null}"#), Some("dtype")),
            (one(r#""shape":16"#), Some("shape")),
            (one(r#""shape":["16"]"#), Some("shape")),
            (one(r#""shape":[null]"#), Some("shape")),
            (one(r#""shape":[true]"#), Some("shape")),
            (one(r#""data_offsets":{"0":1}"#), Some("data_offsets")),
        ] {
            match refused(&json) {
                ModelError::WrongType { tensor, key: found, reason, .. } => {
                    assert_eq!((tensor.as_str(), found), ("t", key), "{json}");
                    assert!(reason.contains("expected") && !reason.contains(" line "), "{reason}");
                }
                other => panic!("{json}: {other:?}"),
            }
        }
    }

    #[test]
    fn metadata_that_is_not_a_string_is_refused() {
        for value in ["1", "null", "{}", "[\"a\"]", "true"] {
            let error = refused(format!(r#"{{"__metadata__":{{"a":"b","k":{value}}}}}"#));
            assert!(matches!(&error, ModelError::MetadataNotString { key, .. } if key == "k"), "{error:?}");
        }
        for value in ["1", "[]", "\"\""] {
            let error = refused(format!(r#"{{"__metadata__":{value}}}"#));
            assert!(matches!(error, ModelError::MetadataNotObject { .. }), "{error:?}");
        }
    }

    #[test]
    fn unknown_dtype_is_refused() {
        for found in ["F128", "bf16", ""] {
            let error = ModelError::UnknownDType { tensor: t(), found: found.to_owned() };
            assert_eq!(refused(tensor(found, "[16]", "[0,16]")), error);
        }
    }

    #[test]
    fn number_that_is_not_an_unsigned_integer_is_refused() {
        for (number, found) in [
            ("-1", "-1"),
            ("-0", "-0.0"),
            ("1.0", "1.0"),
            ("1e1", "10.0"),
            ("18446744073709551616", "1.8446744073709552e19"),
            ("-9223372036854775809", "-9.223372036854776e18"),
        ] {
            for (json, key) in [
                (tensor("U8", &format!("[{number}]"), "[0,16]"), "shape"),
                (tensor("U8", "[16]", &format!("[0,{number}]")), "data_offsets"),
            ] {
                let error = ModelError::BadNumber { tensor: t(), key, found: found.to_owned() };
                assert_eq!(refused(json), error);
            }
        }
    }

    #[test]
    fn shape_above_the_rank_limit_is_refused() {
        let ones = vec!["1"; RANK_LIMIT + 1].join(",");
        let json = tensor("U8", &format!("[{ones}]"), "[0,1]");
        assert_eq!(refused(json), ModelError::RankTooLarge { tensor: t() });
    }

    #[test]
    fn wrong_number_of_offsets_is_refused() {
        for (offsets, found) in [("[]", 0), ("[0]", 1), ("[0,16,16]", 3), ("[0,16,0,0]", 3)] {
            let error = ModelError::OffsetCount { tensor: t(), found };
            assert_eq!(refused(tensor("U8", "[16]", offsets)), error);
        }
    }
}

mod layout_faults {
    use super::*;

    #[test]
    fn overflowing_shape_is_refused() {
        for (dtype, shape) in [
            (DType::U8, vec![1 << 32, 1 << 32]),
            (DType::U8, vec![1 << 61]),
            (DType::F64, vec![1 << 29, 1 << 29]),
            (DType::U8, vec![1 << 32, 1 << 32, 0]),
        ] {
            let json = tensor(dtype.name(), &format!("{shape:?}"), "[0,16]");
            assert_eq!(refused(json), ModelError::ShapeOverflow { tensor: t(), dtype, shape });
        }
    }

    #[test]
    fn tensor_that_ends_within_a_byte_is_refused() {
        let json = tensor("F4", "[3,11]", "[0,16]");
        let (dtype, shape) = (DType::F4, vec![3, 11]);
        assert_eq!(refused(json), ModelError::PartialByte { tensor: t(), dtype, shape, bits: 132 });
    }

    #[test]
    fn reversed_offsets_are_refused() {
        let error = ModelError::OffsetsReversed { tensor: t(), begin: 16, end: 0 };
        assert_eq!(refused(tensor("U8", "[16]", "[16,0]")), error);
    }

    #[test]
    fn tensor_past_the_end_of_the_file_is_refused() {
        for end in [17, u64::MAX] {
            let error = ModelError::PastEnd { tensor: t(), end, data_bytes: 16, missing_bytes: end - 16 };
            assert_eq!(refused(tensor("U8", "[17]", &format!("[0,{end}]"))), error);
        }
    }

    #[test]
    fn length_that_contradicts_shape_and_dtype_is_refused() {
        for (shape, expected) in [(vec![3], 12), (vec![5], 20), (vec![0], 0), (vec![], 4)] {
            let json = tensor("F32", &format!("{shape:?}"), "[0,16]");
            let dtype = DType::F32;
            let error = ModelError::WrongLength { tensor: t(), dtype, shape, expected, found: 16 };
            assert_eq!(refused(json), error);
        }
    }

    #[test]
    fn overlapping_tensors_are_refused() {
        for (tensors, first_end, second_begin) in [
            ([("a", 0, 10), ("b", 6, 16)], 10, 6),
            ([("b", 1, 16), ("a", 0, 16)], 16, 1),
            ([("a", 0, 16), ("b", 0, 16)], 16, 0),
            // An empty tensor occupies no bytes, but must not be inside another.
            ([("a", 0, 16), ("b", 8, 8)], 16, 8),
        ] {
            let json = bytes(&tensors);
            let data = 8 + json.len() as u64;
            let error = ModelError::Overlap {
                first: "a".into(),
                first_end: data + first_end,
                second: "b".into(),
                second_begin: data + second_begin,
            };
            assert_eq!(refused(json), error);
        }
    }

    #[test]
    fn holes_between_tensors_are_refused() {
        for (tensors, begin, end) in
            [(vec![("a", 0, 4), ("b", 8, 16)], 4, 8), (vec![("b", 1, 16)], 0, 1), (vec![("a", 0, 4), ("b", 5, 5)], 4, 5)]
        {
            let json = bytes(&tensors);
            let data = 8 + json.len() as u64;
            let error = ModelError::Hole { begin: data + begin, end: data + end, before: "b".into() };
            assert_eq!(refused(json), error);
        }
    }

    #[test]
    fn bytes_after_the_last_tensor_are_refused() {
        for (json, covered) in [("{}".to_owned(), 0), (bytes(&[("a", 0, 15)]), 15)] {
            let data_end = 8 + json.len() as u64 + covered;
            let file_bytes = 8 + json.len() as u64 + 16;
            assert_eq!(refused(json), ModelError::TrailingBytes { data_end, file_bytes });
        }
    }
}
