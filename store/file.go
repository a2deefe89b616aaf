// The part in a file.

package store

import (
	"errors"
	"fmt"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// growStep is by how much the file is made longer at a time, without backing.
// Writes that do not move the end of the file cost less, and no file system
// prepares for more of them.
const growStep = 1 << 30

// filePart is a sparse file: blocks get backing when they are first written
// and lose it when they are punched.
type filePart struct {
	disk

	grow sync.Mutex // serializes growing; held across I/O
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
	p := &filePart{}
	if err = p.open(f, path, limit, force); err != nil {
		// Whoever has it in use by now may have found it empty.
		if created && !errors.Is(err, ErrInUse) {
			os.Remove(path)
		}
		f.Close()
		return nil, err
	}
	return p, nil
}

// open locks the file, then reads its header or writes one.
func (p *filePart) open(f *os.File, path string, limit int64, force bool) error {
	if err := p.use(f); err != nil {
		return err
	}
	if err := p.lock(); err != nil {
		return err
	}
	info, err := p.f.Stat()
	if err != nil {
		return cause(err)
	}
	var h header
	if info.Size() > 0 {
		h, err = readHeader(p.f)
		if err != nil && p.lockedElsewhere() {
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
	if err := p.lostError(true); err != nil {
		return err // a longer file would not look cut short
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
	return p.control(func(fd int) error { return unix.Fallocate(fd, mode, off, n) })
}

func (p *filePart) NextData(off int64) (int64, error) {
	at, err := p.f.Seek(dataStart+off, unix.SEEK_DATA)
	if errors.Is(err, unix.ENXIO) {
		return p.traits.Slots * SlotSize, nil
	}
	return at - dataStart, cause(err)
}

// Avail is what the file system has left for everybody. What it keeps for root
// is not counted on.
func (p *filePart) Avail() (int64, error) {
	var s unix.Statfs_t
	if err := p.control(func(fd int) error { return unix.Fstatfs(fd, &s) }); err != nil {
		return 0, fmt.Errorf("ask for free space: %w", err)
	}
	return int64(s.Bavail) * s.Bsize, p.lostError(true)
}
