//! The kernels that are booted: each a stock Debian package.

/// One kernel and the machine it gets.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Kernel {
    /// What users call it.
    pub(crate) id: &'static str,
    /// The package that always depends on the newest build.
    pub(crate) package: &'static str,
    /// Modules to load, in this order, each with its parameters. What is built in is skipped.
    pub(crate) modules: &'static [(&'static str, &'static str)],
    pub(crate) memory_mib: u32,
    /// A guest that runs longer is ended.
    pub(crate) seconds_max: u64,
    /// Whether it gets the two disks with an unreadable sector.
    pub(crate) bad_disks: bool,
}

const DISKS: [(&str, &str); 4] = [("virtio_pci", ""), ("virtio_blk", ""), ("nvme", ""), ("ext4", "")];

/// A video loopback: one output device that takes dma-bufs, and one capture device that sees what was put out.
const VIVID: (&str, &str) = ("vivid", "n_devs=1 node_types=0x101 num_inputs=1 input_types=3 num_outputs=1 output_types=1");

pub(crate) const KERNELS: [Kernel; 3] = [
    // udmabuf and the system heap.
    Kernel {
        id: "6.12-cloud",
        package: "linux-image-6.12-cloud-amd64",
        modules: &DISKS,
        memory_mib: 2048,
        seconds_max: 420,
        bad_disks: true,
    },
    // The same and importers.
    Kernel {
        id: "6.12-full",
        package: "linux-image-6.12-amd64",
        modules: &[DISKS[0], DISKS[1], DISKS[2], DISKS[3], ("vgem", ""), VIVID],
        memory_mib: 2048,
        seconds_max: 240,
        bad_disks: false,
    },
    // No device that makes dma-bufs: memfds must do.
    Kernel {
        id: "6.1-cloud",
        package: "linux-image-cloud-amd64",
        modules: &DISKS,
        memory_mib: 2048,
        seconds_max: 240,
        bad_disks: false,
    },
];
