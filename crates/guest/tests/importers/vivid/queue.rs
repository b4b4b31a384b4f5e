//! Manages the buffer queues of the output and of the capture side, and captures frames.

use std::{
    fs::File,
    io::{self, Error, ErrorKind},
    os::fd::AsRawFd,
    ptr::{self, NonNull},
    slice,
    time::{Duration, Instant},
};

use super::v4l2::{
    BUFFER_ERROR, Buffer, DQBUF, QBUF, QUERYBUF, REQBUFS, RequestBuffers, STREAMOFF, STREAMON, ioctl, name_step, vivid_error,
};

/// The time limit for one pass. An emulated guest needs a fraction of a second on an idle host.
const LIMIT: Duration = Duration::from_secs(20);
/// The number of frames to discard after the stream has started, because they may be from an
/// earlier pass.
const SKIPPED: u32 = 2;

/// The buffer queue of the output or of the capture side. Dropping the queue frees its buffers,
/// even after a failed pass. Otherwise, the driver would keep a queued dma-buf and refuse the next
/// pass.
pub(super) struct Queue<'a> {
    pub(super) node: &'a File,
    kind: u32,
    memory: u32,
    pub(super) count: u32,
}

impl<'a> Queue<'a> {
    pub(super) fn new(node: &'a File, kind: u32, memory: u32, count: u32) -> io::Result<Self> {
        let mut request = RequestBuffers { count, kind, memory, ..RequestBuffers::default() };
        name_step("REQBUFS", ioctl(node, &REQBUFS, &mut request))?;
        Ok(Self { node, kind, memory, count: request.count })
    }

    pub(super) fn buffer(&self, index: u32) -> Buffer {
        Buffer { index, kind: self.kind, memory: self.memory, ..Buffer::default() }
    }

    pub(super) fn start(&self) -> io::Result<()> {
        let mut kind = self.kind;
        name_step("STREAMON", ioctl(self.node, &STREAMON, &mut kind))
    }

    /// Stops the stream and frees the buffers. Both calls are harmless on an idle, empty queue.
    pub(super) fn stop(&self) -> io::Result<()> {
        let mut kind = self.kind;
        let stopped = name_step("STREAMOFF", ioctl(self.node, &STREAMOFF, &mut kind));
        let mut none = RequestBuffers { kind: self.kind, memory: self.memory, ..RequestBuffers::default() };
        let freed = name_step("REQBUFS 0", ioctl(self.node, &REQBUFS, &mut none));
        stopped.and(freed)
    }

    /// Captures frames until two successive ones are equal, and returns the second of them. Fails
    /// if this takes longer than [`LIMIT`].
    pub(super) fn capture_frame(&self, frame: usize) -> io::Result<Vec<u8>> {
        let mut mappings = Vec::new();
        for index in 0..self.count {
            let mut buffer = self.buffer(index);
            name_step("QUERYBUF", ioctl(self.node, &QUERYBUF, &mut buffer))?;
            if (buffer.length as usize) < frame {
                return Err(vivid_error(ErrorKind::InvalidData, "the capture buffers are smaller than a frame"));
            }
            mappings.push(Mapping::new(self.node, buffer.place, frame)?);
            let mut buffer = self.buffer(index);
            name_step("queueing a capture buffer", ioctl(self.node, &QBUF, &mut buffer))?;
        }
        self.start()?;
        let deadline = Instant::now() + LIMIT;
        let mut seen = 0;
        let mut last: Option<Vec<u8>> = None;
        loop {
            if !wait_until_readable(self.node, deadline)? {
                let why = format!("no two successive frames were equal within {} s; frames captured: {seen}", LIMIT.as_secs());
                return Err(vivid_error(ErrorKind::TimedOut, &why));
            }
            let mut buffer = self.buffer(0);
            match ioctl(self.node, &DQBUF, &mut buffer) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => continue,
                other => name_step("DQBUF", other)?,
            }
            seen += 1;
            let whole = buffer.flags & BUFFER_ERROR == 0 && buffer.bytesused as usize == frame;
            if whole && seen > SKIPPED {
                let mapping = mappings.get(buffer.index as usize).ok_or_else(|| {
                    vivid_error(ErrorKind::InvalidData, "the driver returned a capture buffer that does not exist")
                })?;
                let now = mapping.to_vec();
                if last.as_ref() == Some(&now) {
                    return Ok(now);
                }
                last = Some(now);
            }
            let mut returned = self.buffer(buffer.index);
            name_step("queueing a capture buffer", ioctl(self.node, &QBUF, &mut returned))?;
        }
    }
}

impl Drop for Queue<'_> {
    fn drop(&mut self) {
        // An error cannot be reported here. A successful pass has already stopped the queue.
        let _ = self.stop();
    }
}

/// Waits for a captured frame. Returns whether one arrived before the deadline.
fn wait_until_readable(node: &File, deadline: Instant) -> io::Result<bool> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(false);
        }
        let mut entry = libc::pollfd { fd: node.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        let milliseconds = i32::try_from(left.as_millis() + 1).unwrap_or(i32::MAX);
        // SAFETY: `entry` is one valid pollfd, and the count is one.
        let ready = unsafe { libc::poll(&raw mut entry, 1, milliseconds) };
        if ready < 0 {
            let error = Error::last_os_error();
            if error.kind() != ErrorKind::Interrupted {
                return Err(error);
            }
        } else if entry.revents & libc::POLLIN != 0 {
            return Ok(true);
        } else if ready > 0 {
            return Err(vivid_error(ErrorKind::BrokenPipe, "the capture queue reports an error"));
        }
    }
}

/// A capture buffer, mapped for reading.
struct Mapping {
    start: NonNull<u8>,
    length: usize,
}

impl Mapping {
    fn new(node: &File, offset: u32, length: usize) -> io::Result<Self> {
        let (read, shared, fd) = (libc::PROT_READ, libc::MAP_SHARED, node.as_raw_fd());
        // SAFETY: no address is requested, so the kernel chooses a free range and replaces no
        // mapping.
        let start = unsafe { libc::mmap(ptr::null_mut(), length, read, shared, fd, libc::off_t::from(offset)) };
        if start == libc::MAP_FAILED {
            return name_step("mapping a capture buffer", Err(Error::last_os_error()));
        }
        let start = NonNull::new(start.cast())
            .ok_or_else(|| vivid_error(ErrorKind::InvalidData, "a capture buffer was mapped at address 0"))?;
        Ok(Self { start, length })
    }

    /// Copies the buffer, which must be dequeued, so that the driver does not write to it.
    fn to_vec(&self) -> Vec<u8> {
        // SAFETY: `length` bytes from `start` are mapped readable until `self` is dropped. The
        // caller has dequeued the buffer, and the slice ends before the buffer is queued again, so
        // the driver does not write to the buffer while the slice exists.
        unsafe { slice::from_raw_parts(self.start.as_ptr(), self.length) }.to_vec()
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: `new` mapped this range, nothing else unmaps it, and no reference outlives
        // `self`.
        let _ = unsafe { libc::munmap(self.start.as_ptr().cast(), self.length) };
    }
}
