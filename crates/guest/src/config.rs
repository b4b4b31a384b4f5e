//! Formats a kernel's configuration (`.config`) as a table row for docs/kernels.md.

use crate::rows::Row;

const TABLE: &str = "kernels";
/// The options to show, in the order of the table's columns.
const OPTIONS: [&str; 5] = ["UDMABUF", "DMABUF_HEAPS_SYSTEM", "DMABUF_HEAPS_CMA", "VIDEO_VIVID", "DRM_VGEM"];

/// Returns the row for a kernel with this `.config`.
pub(crate) fn rows(kernel: &str, config: &str) -> Vec<Row> {
    let facts = OPTIONS.iter().map(|option| describe_option(config, option).to_owned());
    vec![Row { table: TABLE.to_owned(), cells: std::iter::once(kernel.to_owned()).chain(facts).collect() }]
}

fn describe_option(config: &str, option: &str) -> &'static str {
    let value = config.lines().find_map(|line| line.strip_prefix("CONFIG_")?.strip_prefix(option)?.strip_prefix('='));
    match value {
        Some("y") => "built in",
        Some("m") => "module",
        _ => "no",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn option_is_built_in_a_module_or_missing() {
        let config = "# CONFIG_DMABUF_HEAPS_CMA is not set\nCONFIG_UDMABUF=y\nCONFIG_DRM_VGEM=m\nCONFIG_DRM_VGEM_MORE=y\n";
        assert_eq!(
            ["UDMABUF", "DRM_VGEM", "DMABUF_HEAPS_CMA"].map(|option| describe_option(config, option)),
            ["built in", "module", "no"]
        );
        assert_eq!(rows("7.2", config)[0].cells.len(), OPTIONS.len() + 1);
    }
}
