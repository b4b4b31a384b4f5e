//! The part of the V4L2 interface that the loopback needs, as defined in `linux/videodev2.h`.

use std::{
    fs::File,
    io::{self, Error, ErrorKind},
    marker::PhantomData,
    os::fd::AsRawFd,
    ptr,
};

pub(super) const CAPTURE: u32 = 1; // V4L2_BUF_TYPE_VIDEO_CAPTURE
pub(super) const OUTPUT: u32 = 2; // V4L2_BUF_TYPE_VIDEO_OUTPUT
pub(super) const MEMORY_MMAP: u32 = 1;
pub(super) const MEMORY_DMABUF: u32 = 4;
pub(super) const FIELD_NONE: u32 = 1;
pub(super) const COLORSPACE_SRGB: u32 = 8;
pub(super) const RGB24: u32 = u32::from_le_bytes(*b"RGB3");
pub(super) const RGB24_BYTES: u32 = 3;
pub(super) const BUFFER_ERROR: u32 = 0x40;
pub(super) const CAP_CAPTURE: u32 = 0x1;
pub(super) const CAP_OUTPUT: u32 = 0x2;
pub(super) const CAP_STREAMING: u32 = 0x0400_0000;
pub(super) const CAP_DEVICE_CAPS: u32 = 0x8000_0000;
pub(super) const CONTROL_NEXT: u32 = 0x8000_0000;
/// Flags of a control that cannot be set: disabled or read-only.
pub(super) const CONTROL_FIXED: u32 = 0x1 | 0x4;
pub(super) const CONTROL_INTEGER: u32 = 1;
pub(super) const CONTROL_BOOLEAN: u32 = 2;
pub(super) const CONTROL_MENU: u32 = 3;

#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(super) struct Capability {
    pub(super) driver: [u8; 16],
    pub(super) card: [u8; 32],
    pub(super) bus_info: [u8; 32],
    pub(super) version: u32,
    pub(super) capabilities: u32,
    pub(super) device_caps: u32,
    pub(super) reserved: [u32; 3],
}
const _: () = assert!(size_of::<Capability>() == 104);

#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(super) struct PixFormat {
    pub(super) width: u32,
    pub(super) height: u32,
    pub(super) pixelformat: u32,
    pub(super) field: u32,
    pub(super) bytesperline: u32,
    pub(super) sizeimage: u32,
    pub(super) colorspace: u32,
    pub(super) private: u32,
    pub(super) flags: u32,
    pub(super) ycbcr_enc: u32,
    pub(super) quantization: u32,
    pub(super) xfer_func: u32,
}
const _: () = assert!(size_of::<PixFormat>() == 48);

/// The kernel's union is 200 bytes long and aligned like a pointer. `pad` and `rest` reproduce
/// this layout.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(super) struct Format {
    pub(super) kind: u32,
    pub(super) pad: u32,
    pub(super) pix: PixFormat,
    pub(super) rest: [u64; 19],
}
const _: () = assert!(size_of::<Format>() == 208);

#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(super) struct RequestBuffers {
    pub(super) count: u32,
    pub(super) kind: u32,
    pub(super) memory: u32,
    pub(super) capabilities: u32,
    pub(super) flags: u8,
    pub(super) reserved: [u8; 3],
}
const _: () = assert!(size_of::<RequestBuffers>() == 20);

/// `place` is the first half of the kernel's union `m`. It is the offset to pass to `mmap` (for
/// `MEMORY_MMAP`), or the dma-buf's descriptor (for `MEMORY_DMABUF`).
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(super) struct Buffer {
    pub(super) index: u32,
    pub(super) kind: u32,
    pub(super) bytesused: u32,
    pub(super) flags: u32,
    pub(super) field: u32,
    pub(super) pad: u32,
    pub(super) timestamp: [i64; 2],
    pub(super) timecode: [u32; 4],
    pub(super) sequence: u32,
    pub(super) memory: u32,
    pub(super) place: u32,
    pub(super) place_high: u32,
    pub(super) length: u32,
    pub(super) reserved2: u32,
    pub(super) request_fd: i32,
    pub(super) pad_end: u32,
}
const _: () = assert!(size_of::<Buffer>() == 88);

#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(super) struct QueryControl {
    pub(super) id: u32,
    pub(super) kind: u32,
    pub(super) name: [u8; 32],
    pub(super) minimum: i32,
    pub(super) maximum: i32,
    pub(super) step: i32,
    pub(super) default_value: i32,
    pub(super) flags: u32,
    pub(super) reserved: [u32; 2],
}
const _: () = assert!(size_of::<QueryControl>() == 68);

#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(super) struct QueryMenu {
    pub(super) id: u32,
    pub(super) index: u32,
    pub(super) name: [u8; 32],
    pub(super) reserved: u32,
}
const _: () = assert!(size_of::<QueryMenu>() == 44);

#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(super) struct Control {
    pub(super) id: u32,
    pub(super) value: i32,
}
const _: () = assert!(size_of::<Control>() == 8);

/// The timings of a video signal. Only the picture's size, and whether it is interlaced, are read.
/// The other fields are passed unchanged from one node to the other.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(super) struct DvTimings {
    kind: u32,
    pub(super) width: u32,
    pub(super) height: u32,
    pub(super) interlaced: u32,
    words: [u32; 29],
}
const _: () = assert!(size_of::<DvTimings>() == 132);

#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(super) struct EnumDvTimings {
    pub(super) index: u32,
    pub(super) pad: u32,
    pub(super) reserved: [u32; 2],
    pub(super) timings: DvTimings,
}
const _: () = assert!(size_of::<EnumDvTimings>() == 148);

/// An ioctl number tied to the type of its argument, so that the two cannot be mixed up.
pub(super) struct Call<T> {
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

/// Computes an ioctl number of type 'V', like the kernel's macros `_IOR` (direction 2), `_IOW`
/// (direction 1) and `_IOWR` (direction 3).
#[allow(clippy::cast_possible_truncation, reason = "the size is asserted to be small")]
const fn number<T>(direction: u32, command: u8) -> u32 {
    assert!(size_of::<T>() < 1 << 14);
    (direction << 30) | ((size_of::<T>() as u32) << 16) | ((b'V' as u32) << 8) | command as u32
}

pub(super) const QUERYCAP: Call<Capability> = Call::new(0x8068_5600);
pub(super) const S_FMT: Call<Format> = Call::new(0xc0d0_5605);
pub(super) const REQBUFS: Call<RequestBuffers> = Call::new(0xc014_5608);
pub(super) const QUERYBUF: Call<Buffer> = Call::new(0xc058_5609);
pub(super) const QBUF: Call<Buffer> = Call::new(0xc058_560f);
pub(super) const DQBUF: Call<Buffer> = Call::new(0xc058_5611);
pub(super) const STREAMON: Call<u32> = Call::new(0x4004_5612);
pub(super) const STREAMOFF: Call<u32> = Call::new(0x4004_5613);
pub(super) const G_CTRL: Call<Control> = Call::new(0xc008_561b);
pub(super) const S_CTRL: Call<Control> = Call::new(0xc008_561c);
pub(super) const QUERYCTRL: Call<QueryControl> = Call::new(0xc044_5624);
pub(super) const QUERYMENU: Call<QueryMenu> = Call::new(0xc02c_5625);
pub(super) const S_DV_TIMINGS: Call<DvTimings> = Call::new(0xc084_5657);
pub(super) const G_DV_TIMINGS: Call<DvTimings> = Call::new(0xc084_5658);
pub(super) const ENUM_DV_TIMINGS: Call<EnumDvTimings> = Call::new(0xc094_5662);

const _: () = {
    assert!(QUERYCAP.number == number::<Capability>(2, 0));
    assert!(S_FMT.number == number::<Format>(3, 5));
    assert!(REQBUFS.number == number::<RequestBuffers>(3, 8));
    assert!(QUERYBUF.number == number::<Buffer>(3, 9));
    assert!(QBUF.number == number::<Buffer>(3, 15));
    assert!(DQBUF.number == number::<Buffer>(3, 17));
    assert!(STREAMON.number == number::<u32>(1, 18));
    assert!(STREAMOFF.number == number::<u32>(1, 19));
    assert!(G_CTRL.number == number::<Control>(3, 27));
    assert!(S_CTRL.number == number::<Control>(3, 28));
    assert!(QUERYCTRL.number == number::<QueryControl>(3, 36));
    assert!(QUERYMENU.number == number::<QueryMenu>(3, 37));
    assert!(S_DV_TIMINGS.number == number::<DvTimings>(3, 87));
    assert!(G_DV_TIMINGS.number == number::<DvTimings>(3, 88));
    assert!(ENUM_DV_TIMINGS.number == number::<EnumDvTimings>(3, 98));
};

pub(super) fn ioctl<T>(node: &File, call: &Call<T>, argument: &mut T) -> io::Result<()> {
    loop {
        // SAFETY: the number encodes the size of `T` (asserted where each `Call` is made), the
        // kernel accesses that many bytes at the pointer and nothing else, and every field of
        // every `T` here is a plain integer.
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

/// Adds the name of the step to an error, because an errno alone does not say which call failed.
pub(super) fn name_step<T>(step: &str, result: io::Result<T>) -> io::Result<T> {
    result.map_err(|error| Error::new(error.kind(), format!("vivid: {step}: {error}")))
}

pub(super) fn vivid_error(kind: ErrorKind, why: &str) -> Error {
    Error::new(kind, format!("vivid: {why}"))
}

/// Returns the text of a fixed-size, NUL-padded field.
pub(super) fn field_text(field: &[u8]) -> &str {
    let end = field.iter().position(|&byte| byte == 0).unwrap_or(field.len());
    str::from_utf8(&field[..end]).unwrap_or("")
}
