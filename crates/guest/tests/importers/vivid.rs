//! Reads a dma-buf through a real importer: vivid's video output takes the dma-buf, its loopback copies the frame to
//! vivid's capture side, and what the driver's own kernel mapping saw comes back as bytes.
//!
//! The module has to be loaded with one HDMI output and one HDMI input:
//! `modprobe vivid n_devs=1 node_types=0x101 num_inputs=1 input_types=3 num_outputs=1 output_types=1`

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Error, ErrorKind, Seek, SeekFrom},
    marker::PhantomData,
    os::{
        fd::{AsRawFd, BorrowedFd},
        unix::fs::OpenOptionsExt,
    },
    path::PathBuf,
    ptr::{self, NonNull},
    slice,
    time::{Duration, Instant},
};

/// Longest wait for one frame to come round; an emulated guest needs a fraction of a second.
const LIMIT: Duration = Duration::from_secs(10);
/// Frames thrown away after the start, so that nothing left over from before is looked at.
const SKIPPED: u32 = 2;
/// Output buffers that all name the same dma-buf: older kernels do not start with fewer than two.
const OUTPUT_BUFFERS: u32 = 2;
/// Capture buffers; the driver also wants some it can fill while one is being looked at.
const CAPTURE_BUFFERS: u32 = 4;

const CAPTURE: u32 = 1; // V4L2_BUF_TYPE_VIDEO_CAPTURE
const OUTPUT: u32 = 2; // V4L2_BUF_TYPE_VIDEO_OUTPUT
const MEMORY_MMAP: u32 = 1;
const MEMORY_DMABUF: u32 = 4;
const FIELD_NONE: u32 = 1;
const COLORSPACE_SRGB: u32 = 8;
const RGB24: u32 = u32::from_le_bytes(*b"RGB3");
const RGB24_BYTES: u32 = 3;
const BUFFER_ERROR: u32 = 0x40;
const CAP_CAPTURE: u32 = 0x1;
const CAP_OUTPUT: u32 = 0x2;
const CAP_STREAMING: u32 = 0x0400_0000;
const CAP_DEVICE_CAPS: u32 = 0x8000_0000;
const CONTROL_NEXT: u32 = 0x8000_0000;
/// Disabled or read-only: nothing to set.
const CONTROL_FIXED: u32 = 0x1 | 0x4;
const CONTROL_INTEGER: u32 = 1;
const CONTROL_BOOLEAN: u32 = 2;
const CONTROL_MENU: u32 = 3;

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Capability {
    driver: [u8; 16],
    card: [u8; 32],
    bus_info: [u8; 32],
    version: u32,
    capabilities: u32,
    device_caps: u32,
    reserved: [u32; 3],
}
const _: () = assert!(size_of::<Capability>() == 104);

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct PixFormat {
    width: u32,
    height: u32,
    pixelformat: u32,
    field: u32,
    bytesperline: u32,
    sizeimage: u32,
    colorspace: u32,
    private: u32,
    flags: u32,
    ycbcr_enc: u32,
    quantization: u32,
    xfer_func: u32,
}
const _: () = assert!(size_of::<PixFormat>() == 48);

/// The kernel's union is 200 bytes long and aligned like a pointer, which `pad` and `rest` stand for.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Format {
    kind: u32,
    pad: u32,
    pix: PixFormat,
    rest: [u64; 19],
}
const _: () = assert!(size_of::<Format>() == 208);

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct RequestBuffers {
    count: u32,
    kind: u32,
    memory: u32,
    capabilities: u32,
    flags: u8,
    reserved: [u8; 3],
}
const _: () = assert!(size_of::<RequestBuffers>() == 20);

/// `place` is the union's first half: the offset to map at (MMAP) or the fd (DMABUF).
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Buffer {
    index: u32,
    kind: u32,
    bytesused: u32,
    flags: u32,
    field: u32,
    pad: u32,
    timestamp: [i64; 2],
    timecode: [u32; 4],
    sequence: u32,
    memory: u32,
    place: u32,
    place_high: u32,
    length: u32,
    reserved2: u32,
    request_fd: i32,
    pad_end: u32,
}
const _: () = assert!(size_of::<Buffer>() == 88);

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct QueryControl {
    id: u32,
    kind: u32,
    name: [u8; 32],
    minimum: i32,
    maximum: i32,
    step: i32,
    default_value: i32,
    flags: u32,
    reserved: [u32; 2],
}
const _: () = assert!(size_of::<QueryControl>() == 68);

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct QueryMenu {
    id: u32,
    index: u32,
    name: [u8; 32],
    reserved: u32,
}
const _: () = assert!(size_of::<QueryMenu>() == 44);

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Control {
    id: u32,
    value: i32,
}
const _: () = assert!(size_of::<Control>() == 8);

/// Only ever handed from one node to the other, so its inside stays opaque.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct DvTimings {
    words: [u32; 32],
    last: u32,
}
const _: () = assert!(size_of::<DvTimings>() == 132);

/// An ioctl number tied to the type of its argument, so that the two can't be mixed up.
struct Call<T> {
    number: u32,
    argument: PhantomData<T>,
}

impl<T> Call<T> {
    const fn new(number: u32) -> Self {
        assert!((number >> 8) & 0xff == b'V' as u32);
        assert!(((number >> 16) & 0x3fff) as usize == size_of::<T>());
        Self { number, argument: PhantomData }
    }
}

/// What `_IOR`, `_IOW` and `_IOWR` of the kernel's headers make of type 'V' (2 = read, 1 = write, 3 = both).
#[allow(clippy::cast_possible_truncation, reason = "the size is asserted to be small")]
const fn number<T>(direction: u32, command: u8) -> u32 {
    assert!(size_of::<T>() < 1 << 14);
    (direction << 30) | ((size_of::<T>() as u32) << 16) | ((b'V' as u32) << 8) | command as u32
}

const QUERYCAP: Call<Capability> = Call::new(0x8068_5600);
const S_FMT: Call<Format> = Call::new(0xc0d0_5605);
const REQBUFS: Call<RequestBuffers> = Call::new(0xc014_5608);
const QUERYBUF: Call<Buffer> = Call::new(0xc058_5609);
const QBUF: Call<Buffer> = Call::new(0xc058_560f);
const DQBUF: Call<Buffer> = Call::new(0xc058_5611);
const STREAMON: Call<u32> = Call::new(0x4004_5612);
const STREAMOFF: Call<u32> = Call::new(0x4004_5613);
const S_CTRL: Call<Control> = Call::new(0xc008_561c);
const QUERYCTRL: Call<QueryControl> = Call::new(0xc044_5624);
const QUERYMENU: Call<QueryMenu> = Call::new(0xc02c_5625);
const S_DV_TIMINGS: Call<DvTimings> = Call::new(0xc084_5657);
const G_DV_TIMINGS: Call<DvTimings> = Call::new(0xc084_5658);

const _: () = {
    assert!(QUERYCAP.number == number::<Capability>(2, 0));
    assert!(S_FMT.number == number::<Format>(3, 5));
    assert!(REQBUFS.number == number::<RequestBuffers>(3, 8));
    assert!(QUERYBUF.number == number::<Buffer>(3, 9));
    assert!(QBUF.number == number::<Buffer>(3, 15));
    assert!(DQBUF.number == number::<Buffer>(3, 17));
    assert!(STREAMON.number == number::<u32>(1, 18));
    assert!(STREAMOFF.number == number::<u32>(1, 19));
    assert!(S_CTRL.number == number::<Control>(3, 28));
    assert!(QUERYCTRL.number == number::<QueryControl>(3, 36));
    assert!(QUERYMENU.number == number::<QueryMenu>(3, 37));
    assert!(S_DV_TIMINGS.number == number::<DvTimings>(3, 87));
    assert!(G_DV_TIMINGS.number == number::<DvTimings>(3, 88));
};

fn ioctl<T>(node: &File, call: &Call<T>, argument: &mut T) -> io::Result<()> {
    loop {
        // SAFETY: the number encodes the size of `T` (asserted where each `Call` is made), the kernel touches that many
        // bytes at the pointer and nothing else, and every field of every `T` here is a plain integer.
        let code = unsafe { libc::ioctl(node.as_raw_fd(), call.number as _, ptr::from_mut(argument)) };
        if code >= 0 {
            return Ok(());
        }
        let error = Error::last_os_error();
        if error.kind() != ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

/// An ioctl's bare errno says little in a test log: name the step that met it.
fn during<T>(step: &str, result: io::Result<T>) -> io::Result<T> {
    result.map_err(|error| Error::new(error.kind(), format!("vivid: {step}: {error}")))
}

fn failed(kind: ErrorKind, why: &str) -> Error {
    Error::new(kind, format!("vivid: {why}"))
}

/// The text of a fixed-size, NUL-padded field.
fn text(field: &[u8]) -> &str {
    let end = field.iter().position(|&byte| byte == 0).unwrap_or(field.len());
    str::from_utf8(&field[..end]).unwrap_or("")
}

/// Both ends of one vivid instance, set up so that a captured frame is byte for byte the frame that was put out.
pub(crate) struct Loopback {
    output: File,
    capture: File,
    frame: u32,
}

impl Loopback {
    /// Finds the nodes and sets them up. Settings are the driver's, not the file's: use one `Loopback` at a time.
    pub(crate) fn open() -> io::Result<Self> {
        let (output, capture, instance) = nodes()?;
        let linked = during("output controls", set_controls(&output, &instance))?;
        if !during("capture controls", set_controls(&capture, &instance))? && !linked {
            return Err(failed(ErrorKind::Unsupported, "no control connects the output to the input"));
        }
        // The capture side loops only what has the timings it was told to expect.
        let mut timings = DvTimings::default();
        during("G_DV_TIMINGS", ioctl(&output, &G_DV_TIMINGS, &mut timings))?;
        during("S_DV_TIMINGS", ioctl(&capture, &S_DV_TIMINGS, &mut timings))?;

        let out = during("output format", set_format(&output, OUTPUT))?;
        let cap = during("capture format", set_format(&capture, CAPTURE))?;
        let shape = |pix: &PixFormat| (pix.width, pix.height, pix.pixelformat, pix.field, pix.bytesperline, pix.sizeimage);
        let packed = out.width * RGB24_BYTES;
        let wanted = (out.width, out.height, RGB24, FIELD_NONE, packed, packed * out.height);
        if shape(&out) != wanted || shape(&cap) != wanted {
            let why = format!("no common packed format: output {:?}, capture {:?}", shape(&out), shape(&cap));
            return Err(failed(ErrorKind::Unsupported, &why));
        }
        Ok(Self { output, capture, frame: out.sizeimage })
    }

    /// How much of the start of a dma-buf one pass shows.
    pub(crate) fn frame_bytes(&self) -> usize {
        self.frame as usize
    }

    /// What vivid sees in the first [`frame_bytes`](Self::frame_bytes) of a dma-buf of `buffer_bytes`.
    ///
    /// Without a looped picture vivid fills every frame with fresh noise (the set-up chose that), so two captured
    /// frames are alike only if both came from the output: that, not their content, is what makes one acceptable. So
    /// nobody may write to the dma-buf meanwhile.
    pub(crate) fn pass(&mut self, dma_buf: BorrowedFd<'_>, buffer_bytes: usize) -> io::Result<Vec<u8>> {
        let length = u32::try_from(buffer_bytes).map_err(|_| failed(ErrorKind::InvalidInput, "4 GiB or more"))?;
        if length < self.frame {
            return Err(failed(ErrorKind::InvalidInput, "the dma-buf is smaller than a frame"));
        }
        // 6.12 keeps a reference to the dma-buf for good when it finds it too short itself, so ask first.
        let size = during("the dma-buf's size", File::from(dma_buf.try_clone_to_owned()?).seek(SeekFrom::End(0)))?;
        if size < u64::from(length) {
            return Err(failed(ErrorKind::InvalidInput, "the dma-buf is smaller than was said"));
        }
        let fd = u32::try_from(dma_buf.as_raw_fd()).map_err(|_| Error::from_raw_os_error(libc::EBADF))?;

        // Output before capture: the first captured frame can then already be a looped one.
        let output = Queue::new(&self.output, OUTPUT, MEMORY_DMABUF, OUTPUT_BUFFERS)?;
        for index in 0..output.count {
            let mut buffer = output.buffer(index);
            buffer.field = FIELD_NONE;
            buffer.bytesused = self.frame;
            buffer.length = length;
            buffer.place = fd;
            during("queueing the dma-buf", ioctl(output.node, &QBUF, &mut buffer))?;
        }
        output.start()?;

        let capture = Queue::new(&self.capture, CAPTURE, MEMORY_MMAP, CAPTURE_BUFFERS)?;
        let frame = capture.captured(self.frame as usize)?;
        capture.stop()?;
        output.stop()?;
        Ok(frame)
    }
}

/// The output node, the capture node of the same vivid instance, and that instance's number as its controls spell it.
fn nodes() -> io::Result<(File, File, String)> {
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
        if ioctl(&node, &QUERYCAP, &mut about).is_err() || text(&about.driver) != "vivid" {
            continue;
        }
        let has_own = about.capabilities & CAP_DEVICE_CAPS != 0;
        let able = if has_own { about.device_caps } else { about.capabilities };
        let bus = text(&about.bus_info).to_owned();
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
    Err(refused.unwrap_or_else(|| failed(ErrorKind::NotFound, "no output and capture node of one instance")))
}

/// What a control has to be set to for a frame to pass unchanged.
enum Setting {
    Value(i32),
    Item(&'static str),
    /// The menu item of an HDMI output of the same instance.
    Link,
}

/// Decides by name: numbers and kinds of vivid's controls differ between kernels. Names with "Inject" are left alone,
/// those are buttons that break the device on purpose.
fn setting(name: &str, instance: &str) -> Option<Setting> {
    Some(match name {
        // Loopback: one switch on older kernels, a choice of partner on newer ones.
        "Loop Video" => Setting::Value(1),
        _ if name.starts_with("HDMI") && name.ends_with("Connected To") && name.contains(instance) => Setting::Link,
        // Drawn or written over the picture.
        "OSD Text Mode" => Setting::Item("None"),
        "Show Border" | "Show Square" => Setting::Value(0),
        _ if name.starts_with("Insert ") => Setting::Value(0),
        "Fill Percentage of Frame" => Setting::Value(100),
        // Moved about or rescaled.
        "Horizontal Flip" | "Vertical Flip" => Setting::Value(0),
        _ if name.starts_with("Sensor Flipped") => Setting::Value(0),
        _ if name.starts_with("Enable Capture ") || name.starts_with("Enable Output ") => Setting::Value(0),
        // Withheld.
        "Percentage of Dropped Buffers" => Setting::Value(0),
        "DV Timings Signal Mode" => Setting::Item("Current DV Timings"),
        // What is shown without a looped picture: something that never shows twice.
        "Test Pattern" => Setting::Item("Noise"),
        _ => return None,
    })
}

/// Says whether one of the controls was the one that turns the loopback on.
fn set_controls(node: &File, instance: &str) -> io::Result<bool> {
    let mut linked = false;
    let mut query = QueryControl { id: CONTROL_NEXT, ..QueryControl::default() };
    // The list ends with EINVAL.
    while ioctl(node, &QUERYCTRL, &mut query).is_ok() {
        let here = query;
        query = QueryControl { id: here.id | CONTROL_NEXT, ..QueryControl::default() };
        let name = text(&here.name);
        let settable = here.flags & CONTROL_FIXED == 0;
        if !settable || ![CONTROL_INTEGER, CONTROL_BOOLEAN, CONTROL_MENU].contains(&here.kind) {
            continue;
        }
        let Some(setting) = setting(name, instance) else {
            continue;
        };
        let is_link = matches!(setting, Setting::Link) || name == "Loop Video";
        if is_link && linked {
            // An output has one partner only.
            continue;
        }
        let value = match setting {
            Setting::Value(value) => Some(value),
            Setting::Item(item) => menu_index(node, &here, |entry| entry == item),
            Setting::Link => {
                let partner = format!("HDMI {instance}-");
                menu_index(node, &here, |entry| entry.contains(&partner))
            }
        };
        let value = value.ok_or_else(|| failed(ErrorKind::Unsupported, &format!("\"{name}\" lacks the item")))?;
        let mut control = Control { id: here.id, value };
        during(name, ioctl(node, &S_CTRL, &mut control))?;
        if control.value != value {
            return Err(failed(ErrorKind::Unsupported, &format!("\"{name}\" took {} for {value}", control.value)));
        }
        linked |= is_link;
    }
    Ok(linked)
}

fn menu_index(node: &File, control: &QueryControl, is_it: impl Fn(&str) -> bool) -> Option<i32> {
    (control.minimum..=control.maximum).find(|&index| {
        let index = u32::try_from(index).unwrap_or(u32::MAX);
        let mut entry = QueryMenu { id: control.id, index, ..QueryMenu::default() };
        // Entries that a menu leaves out answer EINVAL.
        ioctl(node, &QUERYMENU, &mut entry).is_ok() && is_it(text(&entry.name))
    })
}

/// RGB24 passes the loopback as plain bytes. With cropping and scaling off the size is the signal's own, whatever is
/// asked for: 1280x720 as the driver starts, which is over 2 MiB.
fn set_format(node: &File, kind: u32) -> io::Result<PixFormat> {
    let pix = PixFormat {
        width: 1280,
        height: 720,
        pixelformat: RGB24,
        field: FIELD_NONE,
        colorspace: COLORSPACE_SRGB,
        ..PixFormat::default()
    };
    let mut format = Format { kind, pix, ..Format::default() };
    ioctl(node, &S_FMT, &mut format)?;
    Ok(format.pix)
}

/// One direction's buffers. Dropping it gives them up on every path: the driver must not hold on to a dma-buf that a
/// failed pass queued, nor refuse the next pass.
struct Queue<'a> {
    node: &'a File,
    kind: u32,
    memory: u32,
    count: u32,
}

impl<'a> Queue<'a> {
    fn new(node: &'a File, kind: u32, memory: u32, count: u32) -> io::Result<Self> {
        let mut request = RequestBuffers { count, kind, memory, ..RequestBuffers::default() };
        during("REQBUFS", ioctl(node, &REQBUFS, &mut request))?;
        Ok(Self { node, kind, memory, count: request.count })
    }

    fn buffer(&self, index: u32) -> Buffer {
        Buffer { index, kind: self.kind, memory: self.memory, ..Buffer::default() }
    }

    fn start(&self) -> io::Result<()> {
        let mut kind = self.kind;
        during("STREAMON", ioctl(self.node, &STREAMON, &mut kind))
    }

    /// Can be repeated: both calls are harmless on a queue that is already idle and empty.
    fn stop(&self) -> io::Result<()> {
        let mut kind = self.kind;
        let stopped = during("STREAMOFF", ioctl(self.node, &STREAMOFF, &mut kind));
        let mut none = RequestBuffers { kind: self.kind, memory: self.memory, ..RequestBuffers::default() };
        let freed = during("REQBUFS 0", ioctl(self.node, &REQBUFS, &mut none));
        stopped.and(freed)
    }

    /// Captures until two frames in a row are the same, or the time is up.
    fn captured(&self, frame: usize) -> io::Result<Vec<u8>> {
        let mut mappings = Vec::new();
        for index in 0..self.count {
            let mut buffer = self.buffer(index);
            during("QUERYBUF", ioctl(self.node, &QUERYBUF, &mut buffer))?;
            if (buffer.length as usize) < frame {
                return Err(failed(ErrorKind::InvalidData, "capture buffers smaller than a frame"));
            }
            mappings.push(Mapping::new(self.node, buffer.place, frame)?);
            let mut buffer = self.buffer(index);
            during("queueing a capture buffer", ioctl(self.node, &QBUF, &mut buffer))?;
        }
        self.start()?;
        let deadline = Instant::now() + LIMIT;
        let mut seen = 0;
        let mut last: Option<Vec<u8>> = None;
        loop {
            wait_readable(self.node, deadline)?;
            let mut buffer = self.buffer(0);
            match ioctl(self.node, &DQBUF, &mut buffer) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => continue,
                other => during("DQBUF", other)?,
            }
            seen += 1;
            let whole = buffer.flags & BUFFER_ERROR == 0 && buffer.bytesused as usize == frame;
            if whole && seen > SKIPPED {
                let mapping = mappings
                    .get(buffer.index as usize)
                    .ok_or_else(|| failed(ErrorKind::InvalidData, "a capture buffer nobody asked for"))?;
                let now = mapping.to_vec();
                if last.as_ref() == Some(&now) {
                    return Ok(now);
                }
                last = Some(now);
            }
            let mut again = self.buffer(buffer.index);
            during("queueing a capture buffer", ioctl(self.node, &QBUF, &mut again))?;
        }
    }
}

impl Drop for Queue<'_> {
    fn drop(&mut self) {
        // Nothing can be done about a failure here; a pass that got its frame has already asked and looked.
        let _ = self.stop();
    }
}

fn wait_readable(node: &File, deadline: Instant) -> io::Result<()> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(failed(ErrorKind::TimedOut, "no looped frame came in time"));
        }
        let mut entry = libc::pollfd { fd: node.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        let milliseconds = i32::try_from(left.as_millis() + 1).unwrap_or(i32::MAX);
        // SAFETY: `entry` is one valid pollfd, and the count says one.
        let ready = unsafe { libc::poll(&raw mut entry, 1, milliseconds) };
        if ready < 0 {
            let error = Error::last_os_error();
            if error.kind() != ErrorKind::Interrupted {
                return Err(error);
            }
        } else if entry.revents & libc::POLLIN != 0 {
            return Ok(());
        } else if ready > 0 {
            return Err(failed(ErrorKind::BrokenPipe, "the capture queue reports an error"));
        }
    }
}

/// A capture buffer's memory as this process sees it.
struct Mapping {
    start: NonNull<u8>,
    length: usize,
}

impl Mapping {
    fn new(node: &File, offset: u32, length: usize) -> io::Result<Self> {
        let (read, shared, fd) = (libc::PROT_READ, libc::MAP_SHARED, node.as_raw_fd());
        // SAFETY: no address is asked for, so the kernel picks a free range and replaces no existing mapping.
        let start = unsafe { libc::mmap(ptr::null_mut(), length, read, shared, fd, libc::off_t::from(offset)) };
        if start == libc::MAP_FAILED {
            return during("mapping a capture buffer", Err(Error::last_os_error()));
        }
        let start = NonNull::new(start.cast()).ok_or_else(|| failed(ErrorKind::InvalidData, "mapped at 0"))?;
        Ok(Self { start, length })
    }

    /// To be called while the buffer is dequeued, when the driver leaves it alone.
    fn to_vec(&self) -> Vec<u8> {
        // SAFETY: `length` bytes from `start` are mapped readable until `self` is dropped, and the slice is gone before
        // the buffer is queued again, so the driver does not write to it meanwhile.
        unsafe { slice::from_raw_parts(self.start.as_ptr(), self.length) }.to_vec()
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: exactly the range that `new` mapped, which nothing else unmaps and no reference outlives.
        let _ = unsafe { libc::munmap(self.start.as_ptr().cast(), self.length) };
    }
}
