//! The command line and its subcommands, each of which defines its arguments in its own module.

use clap::{Parser, Subcommand};

use crate::{attach, bench, cat, demo, doctor, inspect, load, manifest, serve};

/// Loads model files straight from storage into shareable memory, through io_uring.
#[derive(Debug, Parser)]
#[command(name = "dmaload", version, max_term_width = 100)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Loads files into memory and prints a report.
    ///
    /// Exit status: 0 on success, 1 if a load failed, 2 on a usage error; with --exec, that of the
    /// command.
    Load(load::Arguments),
    /// Loads a file, or one tensor, and writes it from memory to standard output.
    Cat(cat::Arguments),
    /// Writes a manifest to standard output: checksums of the files' chunks, for `load --verify`.
    Manifest(manifest::Arguments),
    /// Shows the tensors of a file or a model; reads only headers.
    Inspect(inspect::Arguments),
    /// Loads files and shares their memory with other processes through a Unix socket, until
    /// SIGINT or SIGTERM.
    Serve(serve::Arguments),
    /// Maps memory that `serve` has loaded, without copying it, and prints a report.
    Attach(attach::Arguments),
    /// Tests how loads work on this machine, and shows what would help most.
    ///
    /// Exit status: 0 if a load would work, 1 if not, 2 on a usage error.
    Doctor(doctor::Arguments),
    /// Creates a synthetic model, loads it cold, verifies it, and compares the time with
    /// allocate + mmap + memcpy.
    Demo(demo::Arguments),
    /// Compares ways of loading a file cold, with each run in its own process.
    ///
    /// Exit status: 0 on success, 1 if a mode failed (without --pressure) or loaded wrong bytes, 2
    /// on a usage error.
    Bench(bench::Arguments),
    /// A child process of `bench`.
    #[command(subcommand, hide = true)]
    BenchChild(bench::Child),
}

impl Command {
    /// Returns whether standard output should be one JSON object.
    pub(crate) fn wants_json(&self) -> bool {
        match self {
            Command::Load(arguments) => arguments.json,
            Command::Inspect(arguments) => arguments.json,
            Command::Attach(arguments) => arguments.json,
            Command::Doctor(arguments) => arguments.json,
            Command::Bench(arguments) => arguments.json,
            Command::Cat(_) | Command::Manifest(_) | Command::Serve(_) | Command::Demo(_) | Command::BenchChild(_) => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;
    use dmaload::{LoadOptions, LoaderBuilder};
    use dmaload_bench::{Mode, Pressure};
    use proptest::prelude::*;

    use super::*;
    use crate::engine::{RouteChoice, heap_choice};
    use crate::load::Rank;
    use crate::manifests::Against;
    use crate::parse::{bytes, range};

    /// Typical fragments of arguments, and arbitrary characters.
    const TEXT: &str = "(sha256|crc32c|blake3|cgroup|hog|all-but|dma-heap|clean|dirty|auto|normal|:|=|,|-|\\.|/|e|[0-9a-fA-F]{1,64}|[KMGTPE]i?B|\\PC){0,8}";

    #[test]
    fn command_has_the_defaults_of_the_library() {
        let arguments = Arguments::parse_from(["dmaload", "load", "model"]);
        let Command::Load(load::Arguments { engine, .. }) = arguments.command else { panic!("expected the command load") };
        assert_eq!((engine.window, engine.staging, engine.segment_size, engine.chunk_size), (None, None, None, None));
        assert_eq!(engine.queue_depth, LoaderBuilder::QUEUE_DEPTH);
        // The library chooses these defaults; the help text spells them out.
        let help = Arguments::command().find_subcommand_mut("load").unwrap().render_long_help().to_string();
        let help = help.split_whitespace().collect::<Vec<_>>().join(" ");
        for (option, bytes) in [
            ("at least a segment", LoaderBuilder::WINDOW_BYTES),
            ("at most 1 GiB", LoadOptions::SEGMENT_BYTES),
            ("a multiple of 64 KiB", LoadOptions::CHUNK_BYTES),
            ("of the bounce route", LoaderBuilder::STAGING_BYTES),
        ] {
            let default = format!("{option} [default: {}MiB", bytes >> 20);
            assert!(help.contains(&default), "{default:?} is not in {help}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2048))]

        #[test]
        fn parsers_never_panic_and_their_errors_quote_the_argument(text in TEXT) {
            fn check<T>(text: &str, parsed: Result<T, String>) {
                if let Err(error) = parsed {
                    let is_quoted = error.contains(&format!("{text:?}")) || error.contains("digits") || error.contains("checksum");
                    assert!(is_quoted, "{text:?}: {error}");
                }
            }
            check(&text, bytes(&text));
            check(&text, range(&text));
            check(&text, heap_choice(&text));
            check(&text, text.parse::<RouteChoice>());
            check(&text, text.parse::<Rank>());
            check(&text, text.parse::<Against>());
            check(&text, text.parse::<Mode>());
            check(&text, text.parse::<Pressure>());
            check(&text, Mode::peer(&text));
        }
    }
}
