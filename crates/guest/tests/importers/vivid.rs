//! Reads a dma-buf through a real importer. The dma-buf is queued as a buffer of vivid's video
//! output. vivid's loopback then copies the frame from the driver's kernel mapping of the dma-buf
//! to vivid's capture side.
//!
//! Requires the module with one HDMI output and one HDMI input: `modprobe vivid n_devs=1
//! node_types=0x101 num_inputs=1 input_types=3 num_outputs=1 output_types=1`

mod controls;
mod queue;
mod v4l2;

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Error, ErrorKind, Seek, SeekFrom},
    os::{
        fd::{AsRawFd, BorrowedFd},
        unix::fs::OpenOptionsExt,
    },
    path::PathBuf,
};

use self::controls::set_controls;
use self::queue::Queue;
use self::v4l2::{
    CAP_CAPTURE, CAP_DEVICE_CAPS, CAP_OUTPUT, CAP_STREAMING, CAPTURE, COLORSPACE_SRGB, Capability, DvTimings, ENUM_DV_TIMINGS,
    EnumDvTimings, FIELD_NONE, Format, G_DV_TIMINGS, MEMORY_DMABUF, MEMORY_MMAP, OUTPUT, PixFormat, QBUF, QUERYCAP, RGB24,
    RGB24_BYTES, S_DV_TIMINGS, S_FMT, field_text, ioctl, name_step, vivid_error,
};

/// The number of output buffers. All of them use the same dma-buf. Older kernels require at least
/// two buffers to start streaming.
const OUTPUT_BUFFERS: u32 = 2;
/// The number of capture buffers. The driver fills the others while one is being read.
const CAPTURE_BUFFERS: u32 = 4;

/// The output and the capture side of one vivid instance, set up so that a captured frame has the
/// same bytes as the output frame.
pub(crate) struct Loopback {
    output: File,
    capture: File,
    frame: u32,
}

impl Loopback {
    /// Opens the nodes and sets them up for frames of 1280 by 720 pixels, which exceed 2 MiB. The
    /// settings belong to the device, not to the open file, so use only one `Loopback` at a time.
    pub(crate) fn open() -> io::Result<Self> {
        Self::with_frames_of(1280, 720)
    }

    /// Like [`open`](Self::open), but with frames of this size in pixels. The output must support
    /// progressive timings of this size.
    pub(crate) fn with_frames_of(width: u32, height: u32) -> io::Result<Self> {
        let (output, capture, instance) = open_nodes()?;
        let linked = name_step("output controls", set_controls(&output, &instance))?;
        if !name_step("capture controls", set_controls(&capture, &instance))? && !linked {
            return Err(vivid_error(ErrorKind::Unsupported, "no control connects the output to the input"));
        }
        // The capture side accepts only a signal with the timings that it is set to.
        let mut timings = find_timings(&output, width, height)?;
        name_step("S_DV_TIMINGS of the output", ioctl(&output, &S_DV_TIMINGS, &mut timings))?;
        name_step("G_DV_TIMINGS", ioctl(&output, &G_DV_TIMINGS, &mut timings))?;
        name_step("S_DV_TIMINGS", ioctl(&capture, &S_DV_TIMINGS, &mut timings))?;

        let out = name_step("output format", set_format(&output, OUTPUT, &timings))?;
        let cap = name_step("capture format", set_format(&capture, CAPTURE, &timings))?;
        let shape = |pix: &PixFormat| (pix.width, pix.height, pix.pixelformat, pix.field, pix.bytesperline, pix.sizeimage);
        let packed = out.width * RGB24_BYTES;
        let wanted = (out.width, out.height, RGB24, FIELD_NONE, packed, packed * out.height);
        if shape(&out) != wanted || shape(&cap) != wanted {
            let why = format!("no common packed format: output {:?}, capture {:?}", shape(&out), shape(&cap));
            return Err(vivid_error(ErrorKind::Unsupported, &why));
        }
        Ok(Self { output, capture, frame: out.sizeimage })
    }

    /// Returns the size of a frame in bytes. One pass returns this many bytes from the start of a
    /// dma-buf.
    pub(crate) fn frame_bytes(&self) -> usize {
        self.frame as usize
    }

    /// Returns the first [`frame_bytes`](Self::frame_bytes) bytes of a dma-buf of `buffer_bytes`
    /// bytes, as vivid sees them.
    ///
    /// Returns a frame as soon as two successive frames are equal. As long as the picture is not
    /// looped, vivid fills every frame with new noise, so equal frames must come from the output.
    /// The dma-buf must not change during the call.
    pub(crate) fn pass(&mut self, dma_buf: BorrowedFd<'_>, buffer_bytes: usize) -> io::Result<Vec<u8>> {
        let length =
            u32::try_from(buffer_bytes).map_err(|_| vivid_error(ErrorKind::InvalidInput, "the dma-buf is 4 GiB or larger"))?;
        if length < self.frame {
            return Err(vivid_error(ErrorKind::InvalidInput, "the dma-buf is smaller than a frame"));
        }
        // Linux 6.12 leaks a reference to a dma-buf that it finds too short, so check first.
        let size = name_step("the dma-buf's size", File::from(dma_buf.try_clone_to_owned()?).seek(SeekFrom::End(0)))?;
        if size < u64::from(length) {
            return Err(vivid_error(ErrorKind::InvalidInput, "the dma-buf is smaller than `buffer_bytes`"));
        }
        let fd = u32::try_from(dma_buf.as_raw_fd()).map_err(|_| Error::from_raw_os_error(libc::EBADF))?;

        // Start the output before the capture, so that even the first captured frame can come from
        // the output.
        let output = Queue::new(&self.output, OUTPUT, MEMORY_DMABUF, OUTPUT_BUFFERS)?;
        for index in 0..output.count {
            let mut buffer = output.buffer(index);
            buffer.field = FIELD_NONE;
            buffer.bytesused = self.frame;
            buffer.length = length;
            buffer.place = fd;
            name_step("queueing the dma-buf", ioctl(output.node, &QBUF, &mut buffer))?;
        }
        output.start()?;

        let capture = Queue::new(&self.capture, CAPTURE, MEMORY_MMAP, CAPTURE_BUFFERS)?;
        let frame = capture.capture_frame(self.frame as usize)?;
        capture.stop()?;
        output.stop()?;
        Ok(frame)
    }
}

/// Opens the output and the capture node of one vivid instance. Also returns the instance's
/// number, which occurs in the names of its controls.
fn open_nodes() -> io::Result<(File, File, String)> {
    let mut paths: Vec<PathBuf> = Vec::new();
    for entry in fs::read_dir("/dev")? {
        let entry = entry?;
        if entry.file_name().to_str().is_some_and(|name| name.starts_with("video")) {
            paths.push(entry.path());
        }
    }
    paths.sort();
    let mut outputs: Vec<(File, String)> = Vec::new();
    let mut captures: Vec<(File, String)> = Vec::new();
    let mut refused = None;
    for path in paths {
        let node = match OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(&path) {
            Ok(node) => node,
            Err(error) => {
                refused = Some(Error::new(error.kind(), format!("vivid: {}: {error}", path.display())));
                continue;
            }
        };
        let mut about = Capability::default();
        if ioctl(&node, &QUERYCAP, &mut about).is_err() || field_text(&about.driver) != "vivid" {
            continue;
        }
        let has_own = about.capabilities & CAP_DEVICE_CAPS != 0;
        let able = if has_own { about.device_caps } else { about.capabilities };
        let bus = field_text(&about.bus_info).to_owned();
        if able & CAP_STREAMING == 0 {
            continue;
        }
        if able & CAP_OUTPUT != 0 {
            outputs.push((node, bus));
        } else if able & CAP_CAPTURE != 0 {
            captures.push((node, bus));
        }
    }
    for (output, bus) in outputs {
        if let Some(at) = captures.iter().position(|(_, other)| *other == bus) {
            let instance = bus.rsplit('-').next().unwrap_or_default().to_owned();
            return Ok((output, captures.swap_remove(at).0, instance));
        }
    }
    Err(refused.unwrap_or_else(|| vivid_error(ErrorKind::NotFound, "no instance has both an output and a capture node")))
}

/// Finds the first progressive timings of this size.
fn find_timings(node: &File, width: u32, height: u32) -> io::Result<DvTimings> {
    for index in 0.. {
        let mut entry = EnumDvTimings { index, ..EnumDvTimings::default() };
        // At the end of the list, the driver returns EINVAL.
        name_step("ENUM_DV_TIMINGS", ioctl(node, &ENUM_DV_TIMINGS, &mut entry))?;
        let found = entry.timings;
        if (found.width, found.height, found.interlaced) == (width, height, 0) {
            return Ok(found);
        }
    }
    Err(vivid_error(ErrorKind::Unsupported, "the output has no progressive timings of this size"))
}

/// Sets the format RGB24, which passes through the loopback unchanged. With cropping and scaling
/// off, the driver uses the signal's size, regardless of the requested size.
fn set_format(node: &File, kind: u32, timings: &DvTimings) -> io::Result<PixFormat> {
    let pix = PixFormat {
        width: timings.width,
        height: timings.height,
        pixelformat: RGB24,
        field: FIELD_NONE,
        colorspace: COLORSPACE_SRGB,
        ..PixFormat::default()
    };
    let mut format = Format { kind, pix, ..Format::default() };
    ioctl(node, &S_FMT, &mut format)?;
    Ok(format.pix)
}
