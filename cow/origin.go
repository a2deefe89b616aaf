// The origin: the file or block device that always holds the current data.

package cow

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"syscall"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"
)

// SectorSize is what an origin's size must be a multiple of.
const SectorSize = 512

// originFile is what the engine needs of an origin; *hostFile is the real one,
// tests put faults and gates in between.
type originFile interface {
	io.ReaderAt
	io.WriterAt

	// tryReadAt reads what needs no wait for a disk; EAGAIN where that is not
	// all of p.
	tryReadAt(p []byte, off int64) error

	// tryWriteAt writes p unless that would wait for a disk: EAGAIN.
	tryWriteAt(p []byte, off int64) error

	// sync returns nil when everything that was written is on stable storage; with
	// complete set also when that was, and the origin's attributes.
	sync(complete bool) error

	// zero makes the range read as zeroes and frees it if free is set;
	// EOPNOTSUPP where that needs plain writes.
	zero(off, n int64, free bool) error

	// next returns the end of the run of data or hole that begins at off, not
	// beyond end. What cannot tell holes is all data, and so is a range of at most
	// chunkSize that begins with data.
	next(off, end int64) (hole bool, to int64, err error)

	// identify tells who the origin is and when it was last changed; of a block
	// device, if fingerprint is set, also by what is on it.
	identify(fingerprint bool) (identity, error)

	// written is how many sectors were ever written to a block device, or discarded,
	// and are not in memory only; false where nobody counts.
	written() (sectors uint64, ok bool)

	// noteEnded notes durably, with the origin itself, that the generation is not
	// to be trusted any more; ended is what was noted last. Errors where the
	// origin has no place for that.
	noteEnded(generation uuid.UUID) error
	ended() (uuid.UUID, error)

	// willNeed is a hint.
	willNeed(off, n int64)

	// size is the present size in bytes.
	size() (int64, error)

	// truncate cuts a file to size bytes; EINVAL for what is no file.
	truncate(size int64) error

	Close() error
}

// Origin is an opened, checked and locked origin.
type Origin struct {
	path string
	size int64
	file originFile
}

// OpenOrigin opens the raw image file or block device at path for reading and
// writing and locks it: against a second blksnap (flock), against QEMU (its
// byte-range locks), and a block device against mounts and every other exclusive
// user. It refuses what is not a file or block device, is empty, or is no
// multiple of SectorSize long, and what something else is using; the error says
// which and is one line.
func OpenOrigin(path string) (*Origin, error) {
	o, err := openOrigin(path)
	if err != nil {
		return nil, fmt.Errorf("origin %s: %w", path, err)
	}
	return o, nil
}

func openOrigin(path string) (*Origin, error) {
	path, err := filepath.Abs(path)
	if err != nil {
		return nil, err
	}
	st, err := os.Stat(path)
	if err != nil {
		return nil, cause(err)
	}
	flags := os.O_RDWR
	switch {
	case st.Mode().IsRegular():
	case isBlockDevice(st.Mode()):
		flags |= syscall.O_EXCL
	case st.IsDir():
		return nil, errors.New("is a directory, not a file or block device")
	default:
		return nil, errors.New("is neither a regular file nor a block device")
	}
	f, err := os.OpenFile(path, flags, 0)
	if errors.Is(err, syscall.EBUSY) {
		return nil, fmt.Errorf("is mounted or otherwise in use: %w", syscall.EBUSY)
	}
	if err != nil {
		return nil, cause(err)
	}
	size, err := checkOrigin(f, st)
	if err != nil {
		f.Close()
		return nil, err
	}
	h := &hostFile{File: f, block: isBlockDevice(st.Mode())}
	return &Origin{path: path, size: size, file: h}, nil
}

// checkOrigin returns the size of an origin that nobody else is using, locked.
func checkOrigin(f *os.File, st fs.FileInfo) (int64, error) {
	size, err := f.Seek(0, io.SeekEnd)
	if err == nil {
		err = checkSize(size)
	}
	if err != nil {
		return 0, cause(err)
	}
	if err := lockOrigin(f); err != nil {
		return 0, err
	}
	if dev, err := loopBackedBy(st); err != nil {
		return 0, err
	} else if dev != "" {
		return 0, fmt.Errorf("is in use: it backs %s: %w", dev, syscall.EBUSY)
	}
	return size, nil
}

// checkSize says whether an origin may be size bytes long.
func checkSize(size int64) error {
	switch {
	case size == 0:
		return errors.New("is empty")
	case size%SectorSize != 0:
		return fmt.Errorf("is %d bytes long, not a multiple of %d", size, SectorSize)
	}
	return nil
}

// Path is absolute.
func (o *Origin) Path() string { return o.path }

// Size is how many bytes it had when it was opened.
func (o *Origin) Size() int64 { return o.size }

// Close gives the locks back.
func (o *Origin) Close() error { return o.file.Close() }

func isBlockDevice(m fs.FileMode) bool {
	return m&fs.ModeDevice != 0 && m&fs.ModeCharDevice == 0
}

// cause strips the operation and path from an error that will be told with the
// path.
func cause(err error) error {
	if pe := (*fs.PathError)(nil); errors.As(err, &pe) {
		return pe.Err
	}
	return err
}

// hostFile is a file or block device of the host, through its page cache.
type hostFile struct {
	*os.File
	block bool

	// closing keeps the descriptor's number from going to another file while a
	// system call is about to use it. Held shared during those that os.File does
	// not make for us, for writing while the file is closed.
	closing sync.RWMutex
}

// Close waits for the system calls under way.
func (f *hostFile) Close() error {
	f.closing.Lock()
	defer f.closing.Unlock()
	return f.File.Close()
}

// use calls fn, again where a signal interrupts it, with the file's descriptor.
// os.ErrClosed where it has none any more.
func (f *hostFile) use(fn func(fd int) error) error {
	f.closing.RLock()
	defer f.closing.RUnlock()
	fd := f.Fd()
	if fd == ^uintptr(0) {
		return os.ErrClosed
	}
	return retry(func() error { return fn(int(fd)) })
}

func (f *hostFile) tryReadAt(p []byte, off int64) error {
	return f.use(func(fd int) error {
		n, err := unix.Preadv2(fd, [][]byte{p}, off, unix.RWF_NOWAIT)
		if err == nil && n < len(p) {
			return syscall.EAGAIN
		}
		return err
	})
}

// tryWriteLimit is up to where a write into the page cache counts as one that
// does not wait.
const tryWriteLimit = 128 << 10

// tryWriteAt writes whole blocks into the page cache. (RWF_NOWAIT would be the
// word for it, but ext4 refuses it for buffered writes; and a part of a page may
// have to be read first.)
func (f *hostFile) tryWriteAt(p []byte, off int64) error {
	if len(p) > tryWriteLimit || (off|int64(len(p)))&(blockSize-1) != 0 {
		return syscall.EAGAIN
	}
	_, err := f.WriteAt(p, off)
	return err
}

func (f *hostFile) sync(complete bool) error {
	if complete {
		return f.use(unix.Fsync)
	}
	return f.use(unix.Fdatasync)
}

func (f *hostFile) zero(off, n int64, free bool) error {
	mode := uint32(unix.FALLOC_FL_ZERO_RANGE)
	if free {
		mode = unix.FALLOC_FL_PUNCH_HOLE
	}
	err := f.use(func(fd int) error { return unix.Fallocate(fd, mode|unix.FALLOC_FL_KEEP_SIZE, off, n) })
	if err == unix.EINVAL { // a block device and a range that is not aligned to its sectors
		return syscall.EOPNOTSUPP
	}
	return err
}

func (f *hostFile) next(off, end int64) (hole bool, to int64, err error) {
	if f.block {
		return false, end, nil
	}
	err = f.use(func(fd int) (err error) {
		// Again, where data became a hole between the two questions.
		for to = off; to == off && err == nil; {
			hole, to, err = seekRun(fd, off, end)
		}
		return err
	})
	return hole, to, err
}

// seekRun finds the end of the run that begins at off.
func seekRun(fd int, off, end int64) (hole bool, to int64, err error) {
	data, err := unix.Seek(fd, off, unix.SEEK_DATA)
	switch {
	case err == unix.ENXIO:
		// Nothing but a hole up to the end of the file. What was cut off behind
		// our back was data, for all we know.
		size, err := unix.Seek(fd, 0, io.SeekEnd)
		if err == nil && size < end {
			err = io.ErrUnexpectedEOF
		}
		return true, end, err
	case err == unix.EINVAL:
		return false, end, nil
	case err != nil:
		return false, off, err
	case data > off:
		return true, min(data, end), nil
	case end-off <= chunkSize:
		// To find where data ends, some hosts look at every page from here on:
		// 7 ms for 1 GiB on tmpfs, and each first write would wait for it.
		return false, end, nil
	}
	if to, err = unix.Seek(fd, off, unix.SEEK_HOLE); err != nil {
		return false, off, err
	}
	return false, min(to, end), nil
}

func (f *hostFile) willNeed(off, n int64) {
	f.use(func(fd int) error { return unix.Fadvise(fd, off, n, unix.FADV_WILLNEED) })
}

// size needs the file's position, which nothing else does.
func (f *hostFile) size() (int64, error) { return f.Seek(0, io.SeekEnd) }

func (f *hostFile) truncate(size int64) error { return f.Truncate(size) }

func (f *hostFile) identify(fingerprint bool) (identity, error) {
	size, err := f.size()
	if err != nil {
		return identity{}, err
	}
	return identify(f.File, size, fingerprint)
}

// endedAttr is the extended attribute of a file that names the generation that
// has ended; uuid.Max: whichever is in the state directory.
const endedAttr = "user.blksnap.ended"

func (f *hostFile) noteEnded(generation uuid.UUID) error {
	err := f.use(func(fd int) error { return unix.Fsetxattr(fd, endedAttr, []byte(generation.String()), 0) })
	if err != nil {
		return fmt.Errorf("set %s: %w", endedAttr, err)
	}
	return f.Sync()
}

func (f *hostFile) ended() (uuid.UUID, error) {
	var b [36]byte
	var n int
	err := f.use(func(fd int) (err error) {
		n, err = unix.Fgetxattr(fd, endedAttr, b[:])
		return err
	})
	if err != nil {
		return uuid.Nil, err
	}
	return uuid.ParseBytes(b[:n])
}
