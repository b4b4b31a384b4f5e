//! Lists the kernels that can be booted. They are stock Debian kernels, identified by their
//! release line and flavor.

use dmaload_guest::Line;

/// The configuration with which Debian built a kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Flavor {
    /// A kernel for virtual machines, with few drivers and no importers.
    Cloud,
    /// A kernel for all machines. Importers are available as modules.
    Full,
}

impl Flavor {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Flavor::Cloud => "cloud",
            Flavor::Full => "full",
        }
    }

    /// Returns the id of the kernel with this flavor and release line, such as `6.12-full`.
    pub(crate) fn id(self, (major, minor): Line) -> String {
        format!("{major}.{minor}-{}", self.name())
    }
}

/// A kernel module to load.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Wanted {
    pub(crate) name: &'static str,
    pub(crate) parameters: &'static str,
    /// Whether to skip the module if the kernel does not have it.
    pub(crate) optional: bool,
}

/// A kernel and the machine it boots on.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Kernel {
    /// The id, which has the form `LINE-FLAVOR`.
    pub(crate) id: &'static str,
    pub(crate) line: Line,
    pub(crate) flavor: Flavor,
    /// The archive suites to search for the kernel's packages, in this order.
    pub(crate) suites: &'static [&'static str],
    /// Whether this kernel is booted if `--kernel` is not given.
    pub(crate) by_default: bool,
    /// The modules to load, in this order. Modules that are built into the kernel are skipped.
    pub(crate) modules: &'static [Wanted],
    pub(crate) memory_mib: u32,
    /// The time limit in seconds. A guest that exceeds it is killed.
    pub(crate) seconds_max: u64,
    /// Whether the machine has the two disks with an unreadable sector.
    pub(crate) bad_disks: bool,
}

const fn required(name: &'static str, parameters: &'static str) -> Wanted {
    Wanted { name, parameters, optional: false }
}

const fn optional(name: &'static str) -> Wanted {
    Wanted { name, parameters: "", optional: true }
}

/// Drivers for the disks and their file system, and for the devices that create dma-bufs.
const CLOUD: [Wanted; 8] = [
    required("virtio_pci", ""),
    required("virtio_blk", ""),
    required("nvme", ""),
    // ext4 requests this module through an alias. Nothing in the guest resolves aliases, so the
    // module must be listed here.
    optional("crc32c_generic"),
    required("ext4", ""),
    optional("udmabuf"),
    optional("system_heap"),
    optional("cma_heap"),
];

/// The modules in `CLOUD`, and importers. vivid is configured as a video loopback: frames that are
/// sent to its output device, for example from dma-bufs, arrive at its capture device.
const FULL: [Wanted; 10] = [
    CLOUD[0],
    CLOUD[1],
    CLOUD[2],
    CLOUD[3],
    CLOUD[4],
    CLOUD[5],
    CLOUD[6],
    CLOUD[7],
    required("vgem", ""),
    required("vivid", "n_devs=1 node_types=0x101 num_inputs=1 input_types=3 num_outputs=1 output_types=1"),
];

const OLD: &[&str] = &["bookworm-security", "bookworm"];
const LONG_TERM: &[&str] = &["bookworm-security", "trixie-security", "trixie"];
/// `trixie-backports` keeps earlier releases, whereas testing (`forky`) has only the newest one.
const RECENT: &[&str] = &["trixie-backports", "forky"];
/// The first releases of a new line appear in `experimental` before they reach `trixie-backports`.
const NEXT: &[&str] = &["trixie-backports", "experimental"];

const fn kernel(id: &'static str, line: Line, flavor: Flavor, suites: &'static [&'static str]) -> Kernel {
    let modules: &[Wanted] = match flavor {
        Flavor::Cloud => &CLOUD,
        Flavor::Full => &FULL,
    };
    Kernel { id, line, flavor, suites, by_default: false, modules, memory_mib: 2048, seconds_max: 420, bad_disks: false }
}

pub(crate) const KERNELS: [Kernel; 9] = [
    // The slowest kernel boots first. If it booted last, it would still be running long after the
    // other kernels had finished.
    Kernel { bad_disks: true, by_default: true, ..kernel("6.12-full", (6, 12), Flavor::Full, LONG_TERM) },
    Kernel { by_default: true, ..kernel("7.2-full", (7, 2), Flavor::Full, RECENT) },
    Kernel { by_default: true, ..kernel("6.18-full", (6, 18), Flavor::Full, RECENT) },
    // This kernel has no devices that create dma-bufs.
    Kernel { by_default: true, ..kernel("6.1-cloud", (6, 1), Flavor::Cloud, OLD) },
    // The remaining kernels are booted only if `--kernel` names them.
    Kernel { bad_disks: true, ..kernel("6.12-cloud", (6, 12), Flavor::Cloud, LONG_TERM) },
    kernel("6.18-cloud", (6, 18), Flavor::Cloud, RECENT),
    kernel("7.2-cloud", (7, 2), Flavor::Cloud, RECENT),
    kernel("7.3-cloud", (7, 3), Flavor::Cloud, NEXT),
    kernel("7.3-full", (7, 3), Flavor::Full, NEXT),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn id_is_the_line_and_the_flavor() {
        for kernel in KERNELS {
            assert_eq!(kernel.id, kernel.flavor.id(kernel.line));
        }
    }
}
