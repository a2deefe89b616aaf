// The part in a file.

package store

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"
)

const (
	// growStep is by how much the file is made longer at a time, without
	// backing. Writes that do not move the end of the file cost less, and
	// no file system prepares for more of them.
	growStep = 1 << 30

	// minDefaultLimit is the smallest limit that is chosen for a user who
	// gave none.
	minDefaultLimit = 16 << 20
)

// filePart is a sparse file: blocks get backing when they are first written
// and lose it when they are punched.
type filePart struct {
	disk

	grow sync.Mutex   // serializes growing; held across I/O
	size atomic.Int64 // of the file
}

// OpenFile opens the snapstore in the file path, and creates it, with mode
// 0600, where it does not exist or is empty. A limit of 0 is the one in its
// header, or half of the space that is free when it is created. A file that
// holds anything else is refused with ErrForeign, ErrNewer or ErrDamaged
// unless force is set, one that is open elsewhere with ErrInUse always. After
// an error no file is left behind that was not there before.
func OpenFile(path string, limit int64, force bool) (_ Part, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("open snapstore %s: %w", path, err)
		}
	}()
	if limit != 0 {
		if err := checkLimit(limit); err != nil {
			return nil, err
		}
	}
	f, created, err := openOrCreate(path)
	if err != nil {
		return nil, err
	}
	p := &filePart{disk: disk{f: f}}
	if err = p.open(path, limit, force); err != nil {
		// Whoever has it in use by now may have found it empty.
		if created && !errors.Is(err, ErrInUse) {
			os.Remove(path)
		}
		f.Close()
		return nil, err
	}
	return p, nil
}

// openOrCreate also says whether it created the file.
func openOrCreate(path string) (f *os.File, created bool, err error) {
	info, err := os.Stat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		f, err = os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
		if errors.Is(err, fs.ErrNotExist) {
			return nil, false, fmt.Errorf("its directory %s does not exist", filepath.Dir(path))
		}
		return f, err == nil, cause(err)
	case err != nil:
		return nil, false, cause(err)
	case info.Mode()&fs.ModeDevice != 0:
		return nil, false, fmt.Errorf("it is a device; use dev:%s", path)
	case !info.Mode().IsRegular():
		return nil, false, fmt.Errorf("it is not a regular file (%s)", info.Mode())
	}
	f, err = os.OpenFile(path, os.O_RDWR, 0)
	return f, false, cause(err)
}

// open locks the file, then reads its header or writes one.
func (p *filePart) open(path string, limit int64, force bool) error {
	if err := flock(p.f); err != nil {
		return err
	}
	info, err := p.f.Stat()
	if err != nil {
		return cause(err)
	}
	var h header
	if info.Size() > 0 {
		h, err = readHeader(p.f)
		if err != nil && lockedElsewhere(p.f) {
			return ErrInUse
		}
	}
	if info.Size() == 0 || err != nil && force {
		h, err = p.create(limit)
	} else if err == nil && limit != 0 && limit != h.limit {
		h.limit = limit
		err = p.writeHeader(h)
	}
	if err != nil {
		return err
	}
	return p.measure(path, h)
}

// flock takes the lock that keeps a second user away. It falls when the last
// thread of this process that uses the file is gone.
func flock(f *os.File) error {
	err := control(f, func(fd int) error { return unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB) })
	if errors.Is(err, unix.EWOULDBLOCK) {
		return ErrInUse
	}
	return err
}

// lockedElsewhere says whether another process holds a lock on part of f, as
// QEMU does on the images that it uses.
func lockedElsewhere(f *os.File) bool {
	l := unix.Flock_t{Type: unix.F_WRLCK}
	err := control(f, func(fd int) error { return unix.FcntlFlock(uintptr(fd), unix.F_OFD_GETLK, &l) })
	return err == nil && l.Type != unix.F_UNLCK
}

// create empties the file and makes it a snapstore.
func (p *filePart) create(limit int64) (h header, err error) {
	if limit == 0 {
		if limit, err = p.defaultLimit(); err != nil {
			return header{}, err
		}
	}
	if err := p.f.Truncate(0); err != nil {
		return header{}, cause(err)
	}
	h = header{id: uuid.New(), limit: limit}
	if err := p.writeHeader(h); err != nil {
		return header{}, err
	}
	return h, syncDir(filepath.Dir(p.f.Name()))
}

// defaultLimit is half of the space that is free once the file is empty.
func (p *filePart) defaultLimit() (int64, error) {
	info, err := p.f.Stat()
	if err != nil {
		return 0, cause(err)
	}
	free, err := p.Avail()
	if err != nil {
		return 0, err
	}
	if st, ok := info.Sys().(*syscall.Stat_t); ok {
		free += st.Blocks * 512
	}
	limit := free / 2 / SlotSize * SlotSize
	if limit < minDefaultLimit {
		return 0, fmt.Errorf("its file system has %d bytes free, half of which is less than %s: free some or give a limit",
			free, FormatSize(minDefaultLimit))
	}
	return limit, nil
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

// measure fills in the traits.
func (p *filePart) measure(path string, h header) error {
	info, err := p.f.Stat()
	if err != nil {
		return cause(err)
	}
	size := max(info.Size(), dataStart)
	p.size.Store(info.Size())
	p.traits = Traits{
		Spec:    Spec{Kind: File, Path: path, Limit: h.limit},
		ID:      h.id,
		Limit:   h.limit,
		Slots:   sparseSlots(h.limit),
		Held:    (size - dataStart + SlotSize - 1) / SlotSize,
		MayHang: true,
	}
	// The gap behind the header never holds anything: a place to find out
	// whether this file system can punch holes at all.
	err = p.fallocate(unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, headerSize, dataStart-headerSize)
	if errors.Is(err, unix.EOPNOTSUPP) {
		p.traits.Coarse, err = true, nil
		p.traits.Slots = h.limit / SlotSize
	}
	p.traits.Slots = max(p.traits.Slots, p.traits.Held)
	return err
}

func (p *filePart) WriteAt(b []byte, off int64) (int, error) {
	if err := p.growTo(dataStart + off + int64(len(b))); err != nil {
		return 0, err
	}
	return p.disk.WriteAt(b, off)
}

// growTo makes the file at least end bytes long.
func (p *filePart) growTo(end int64) error {
	if end <= p.size.Load() {
		return nil
	}
	p.grow.Lock()
	defer p.grow.Unlock()
	if end <= p.size.Load() {
		return nil
	}
	size := min((end+growStep-1)/growStep*growStep, dataStart+p.traits.Slots*SlotSize)
	if err := p.f.Truncate(size); err != nil {
		// A limit on the size of files may leave room for this much.
		size = end
		if err := p.f.Truncate(size); err != nil {
			return noSpace(err)
		}
	}
	p.size.Store(size)
	return nil
}

func (p *filePart) Prepare(off, n int64) error {
	if err := p.growTo(dataStart + off + n); err != nil {
		return err
	}
	return noSpace(p.fallocate(unix.FALLOC_FL_KEEP_SIZE, dataStart+off, n))
}

func (p *filePart) Punch(off, n int64) error {
	if p.traits.Coarse {
		return nil
	}
	return p.fallocate(unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, dataStart+off, n)
}

func (p *filePart) fallocate(mode uint32, off, n int64) error {
	return control(p.f, func(fd int) error { return unix.Fallocate(fd, mode, off, n) })
}

func (p *filePart) NextData(off int64) (int64, error) {
	at, err := p.f.Seek(dataStart+off, unix.SEEK_DATA)
	if errors.Is(err, unix.ENXIO) {
		return p.traits.Slots * SlotSize, nil
	}
	return at - dataStart, cause(err)
}

// Avail asks the file system, which counts what only root may use for root.
func (p *filePart) Avail() (int64, error) {
	var s unix.Statfs_t
	if err := control(p.f, func(fd int) error { return unix.Fstatfs(fd, &s) }); err != nil {
		return 0, fmt.Errorf("ask for free space: %w", err)
	}
	return int64(s.Bavail) * s.Bsize, p.writeBackError()
}
