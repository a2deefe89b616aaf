// The part on a block device.

package store

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"os"
	"sync/atomic"
	"unsafe"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"
)

// devPart is a block device. Its space is there whether it is used or not, so
// a slot counts whole; what is free is discarded.
type devPart struct {
	disk
	noDiscard atomic.Bool // it cannot, as was found out
}

// OpenDev opens the snapstore on the block device path, exclusively: ErrInUse
// says that it is mounted, or part of something else, or open. Where it holds
// no snapstore but nothing known either, it is made one; a device that bears a
// signature is refused with ErrForeign, ErrNewer or ErrDamaged unless force is
// set, which wipes it.
func OpenDev(path string, force bool) (_ Part, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("open snapstore %s: %w", path, err)
		}
	}()
	info, err := os.Stat(path)
	if err != nil {
		return nil, cause(err)
	}
	if info.Mode()&(fs.ModeDevice|fs.ModeCharDevice) != fs.ModeDevice {
		return nil, fmt.Errorf("it is not a block device; a file is file:%s", path)
	}
	f, err := os.OpenFile(path, os.O_RDWR|os.O_EXCL, 0)
	if errors.Is(err, unix.EBUSY) {
		return nil, ErrInUse
	}
	if err != nil {
		return nil, cause(err)
	}
	p := &devPart{}
	if err := p.open(f, path, force); err != nil {
		f.Close()
		return nil, err
	}
	return p, nil
}

func (p *devPart) open(f *os.File, path string, force bool) error {
	if err := p.use(f); err != nil {
		return err
	}
	size, err := p.f.Seek(0, io.SeekEnd)
	if err != nil {
		return cause(err)
	}
	slots := min((size-dataStart)/SlotSize, maxSlots)
	if slots < 1 {
		return fmt.Errorf("its %d bytes are too few: a snapstore takes %s", size, FormatSize(dataStart+SlotSize))
	}
	held := slots
	h, err := readHeader(p.f)
	if errors.Is(err, ErrForeign) || err != nil && force {
		held = 0
		h = header{id: uuid.New(), limit: slots * SlotSize}
		err = p.create(h, size, force)
	}
	p.traits = Traits{
		Spec:    Spec{Kind: Dev, Path: path},
		ID:      h.id,
		Limit:   slots * SlotSize,
		Slots:   slots,
		Held:    held,
		Coarse:  true,
		MayHang: true,
	}
	return err
}

// create wipes what other programs would know the device by, so that none of
// them takes it for its own while it is a snapstore.
func (p *devPart) create(h header, size int64, force bool) error {
	for s, err := range signatures(p.f, size) {
		switch {
		case err != nil:
			return err
		case !force:
			return fmt.Errorf("%w: it bears the signature of %s", ErrForeign, s.name)
		}
		if _, err := p.f.WriteAt(make([]byte, len(s.magic)), s.off); err != nil {
			return fmt.Errorf("wipe the signature of %s: %w", s.name, cause(err))
		}
	}
	return p.writeHeader(h)
}

// Prepare does nothing: space is always there.
func (p *devPart) Prepare(off, n int64) error { return nil }

// Punch discards the range where the device can, and is content where not.
func (p *devPart) Punch(off, n int64) error {
	if p.noDiscard.Load() {
		return nil
	}
	span := [2]uint64{uint64(dataStart + off), uint64(n)}
	err := p.control(func(fd int) error {
		_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.BLKDISCARD, uintptr(unsafe.Pointer(&span)))
		if errno != 0 {
			return errno
		}
		return nil
	})
	if errors.Is(err, unix.EOPNOTSUPP) {
		p.noDiscard.Store(true)
		return nil
	}
	return err
}

func (p *devPart) NextData(off int64) (int64, error) { return off, nil }

// Avail does not bound the part further: its size does.
func (p *devPart) Avail() (int64, error) { return math.MaxInt64, p.lostError(true) }
