//! Converts the results to JSON.

use serde_json::{Map, Value, json};

use crate::mode::Mode;
use crate::results::{ModeRuns, Results, Run};
use crate::stats::Spread;

/// Returns all results as one object: see docs/cli.md.
pub(crate) fn to_json(results: &Results) -> Value {
    json!({
        "rounds": results.rounds,
        "file_bytes": results.file_bytes,
        "page_size_bytes": results.page_size_bytes(),
        "limit_bytes_per_second": results.limit_bytes_per_second(),
        "limit_destinations": results.destinations.iter().map(|(bytes, seconds)| json!({
            "bytes": bytes,
            "seconds_median": seconds,
        })).collect::<Vec<_>>(),
        "pressure": results.pressure,
        "user": results.user,
        "warm": results.warm,
        "read_ahead_kib": results.read_ahead_kib,
        "modes": results.modes.iter().map(|runs| mode_to_json(results, runs)).collect::<Vec<_>>(),
    })
}

fn mode_to_json(results: &Results, runs: &ModeRuns) -> Value {
    let mode = runs.mode;
    json!({
        "name": mode.name(),
        "pages": runs.page_bytes().map(page_size_name),
        "seconds": runs.seconds().map(spread_to_json),
        "ratio_to_normal": results.ratio(Mode::Normal, mode).map(spread_to_json),
        "share_of_limit": results.ratio(Mode::Limit, mode).map(spread_to_json),
        "times_direct_io": results.ratio(mode, Mode::DirectIo).map(spread_to_json),
        "overlap": if mode == Mode::DirectIo { results.overlap(mode).map(spread_to_json) } else { None },
        "cpu_seconds_per_gib": results.cpu_seconds_per_gib(mode),
        "first_segment_share": runs.first_segment_share(),
        "peak_extra_bytes": runs.peak_extra_bytes(),
        "notes": runs.notes(),
        "runs": runs.runs.iter().map(|run| run.as_ref().ok().map(run_to_json)).collect::<Vec<_>>(),
        "failures": runs.failures().map(|(round, failure)| json!({
            "round": round,
            "reason": failure.reason,
            "wrong_bytes": failure.wrong_bytes,
        })).collect::<Vec<_>>(),
    })
}

fn run_to_json(run: &Run) -> Value {
    let mut object = Map::new();
    object.insert("seconds".to_owned(), json!(run.seconds));
    object.insert("cpu_seconds".to_owned(), json!(run.cpu_seconds));
    if let Some(apart) = run.apart {
        object.insert("allocate_seconds".to_owned(), json!(apart.allocate_seconds));
        object.insert("read_seconds".to_owned(), json!(apart.read_seconds));
    }
    object.into()
}

fn spread_to_json(spread: Spread) -> Value {
    json!({ "median": spread.median, "min": spread.min, "max": spread.max })
}

/// Formats a page size as in `--pages` (`4k`, `2m`), or as `mixed` if the runs got different ones.
fn page_size_name((smallest, largest): (u64, u64)) -> String {
    match smallest {
        _ if smallest != largest => "mixed".to_owned(),
        size if size < 1 << 20 => format!("{}k", size >> 10),
        size => format!("{}m", size >> 20),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::results::tests::{killed, results, run};

    #[test]
    fn json_numbers_are_consistent() {
        let mut measured = results(vec![
            (Mode::Normal, vec![run(2.0), run(3.0)]),
            (Mode::DirectIo, vec![run(0.5), killed()]),
            (Mode::Limit, vec![run(0.25), run(0.25)]),
        ]);
        measured.pressure = Some("a cgroup".to_owned());
        let value = to_json(&measured);
        assert_eq!(value["limit_bytes_per_second"], f64::from(1_u32 << 31));
        assert_eq!(value["page_size_bytes"], 4096);
        let [normal, direct, limit] = value["modes"].as_array().unwrap().as_slice() else { panic!("expected three modes") };
        assert_eq!(normal["ratio_to_normal"], json!({ "median": 1.0, "min": 1.0, "max": 1.0 }));
        assert_eq!(direct["ratio_to_normal"]["median"], 4.0);
        assert_eq!(direct["share_of_limit"]["median"], 0.5);
        assert_eq!((&normal["times_direct_io"]["median"], &direct["times_direct_io"]["max"]), (&json!(4.0), &json!(1.0)));
        assert_eq!(direct["pages"], "4k");
        assert_eq!(direct["runs"], json!([{ "seconds": 0.5, "cpu_seconds": 0.25 }, null]));
        assert_eq!(direct["failures"], json!([{ "round": 2, "reason": "killed", "wrong_bytes": false }]));
        assert_eq!(limit["share_of_limit"]["max"], 1.0);
        assert_eq!(limit["cpu_seconds_per_gib"], 0.25);
    }

    #[test]
    fn mode_that_always_failed_has_no_numbers() {
        let measured = results(vec![(Mode::Normal, vec![killed()]), (Mode::Limit, vec![run(1.0)])]);
        let value = to_json(&measured);
        for key in ["seconds", "ratio_to_normal", "share_of_limit", "cpu_seconds_per_gib", "pages", "peak_extra_bytes"] {
            assert_eq!(value["modes"][0][key], Value::Null, "{key}");
        }
        assert_eq!(value["modes"][1]["ratio_to_normal"], Value::Null);
    }

    #[test]
    fn pages_are_named_as_on_the_command_line() {
        assert_eq!(
            [(4096, 4096), (2 << 20, 2 << 20), (4096, 2 << 20), (65536, 65536)].map(page_size_name),
            ["4k", "2m", "mixed", "64k"]
        );
    }
}
