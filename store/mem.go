// The part in memory.

package store

import (
	"errors"
	"fmt"
	"math"
	"sync"

	"golang.org/x/sys/unix"
)

// memPart is a reservation of addresses. Pages come when they are first
// written and go when they are punched.
type memPart struct {
	traits Traits

	// mu keeps the mapping in place while it is read or written, and is
	// held exclusively to unmap it.
	mu  sync.RWMutex
	mem []byte // nil once closed
}

var errClosed = errors.New("snapstore is closed")

// OpenMem makes a part of limit bytes of memory, a quarter of the machine's if
// limit is 0. No memory is taken before it is used.
func OpenMem(limit int64) (Part, error) {
	var err error
	if limit == 0 {
		limit, err = quarterOfMemory()
	}
	if err == nil {
		err = checkLimit(limit)
	}
	if err != nil {
		return nil, fmt.Errorf("open snapstore in memory: %w", err)
	}
	p := &memPart{}
	slots := sparseSlots(limit)
	for {
		p.mem, err = unix.Mmap(-1, 0, int(slots*SlotSize), unix.PROT_READ|unix.PROT_WRITE,
			unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE)
		if err == nil {
			break
		}
		// A kernel that never overcommits, or a limit on address space,
		// leaves room for fewer slots that are used in part.
		if slots /= 2; slots*SlotSize < limit {
			return nil, fmt.Errorf("reserve %s of memory for the snapstore: %w", FormatSize(limit), err)
		}
	}
	// A huge page under a single block would take 512 times its space.
	_ = unix.Madvise(p.mem, unix.MADV_NOHUGEPAGE)
	// What images were made of is of no use in a core dump.
	_ = unix.Madvise(p.mem, unix.MADV_DONTDUMP)
	p.traits = Traits{Spec: Spec{Kind: Mem, Limit: limit}, Slots: slots}
	return p, nil
}

func quarterOfMemory() (int64, error) {
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		return 0, fmt.Errorf("ask for the size of memory: %w", err)
	}
	total := int64(info.Totalram) * int64(info.Unit)
	return total / 4 / SlotSize * SlotSize, nil
}

func (p *memPart) Traits() Traits { return p.traits }

func (p *memPart) ReadAt(b []byte, off int64) (int, error) {
	p.mu.RLock()
	defer p.mu.RUnlock()
	if p.mem == nil {
		return 0, errClosed
	}
	return copy(b, p.mem[off:off+int64(len(b))]), nil
}

func (p *memPart) WriteAt(b []byte, off int64) (int, error) {
	p.mu.RLock()
	defer p.mu.RUnlock()
	if p.mem == nil {
		return 0, errClosed
	}
	return copy(p.mem[off:off+int64(len(b))], b), nil
}

func (p *memPart) Prepare(off, n int64) error { return p.advise(off, n, unix.MADV_POPULATE_WRITE) }

func (p *memPart) Punch(off, n int64) error { return p.advise(off, n, unix.MADV_DONTNEED) }

func (p *memPart) advise(off, n int64, advice int) error {
	p.mu.RLock()
	defer p.mu.RUnlock()
	if p.mem == nil {
		return errClosed
	}
	return unix.Madvise(p.mem[off:off+n], advice)
}

func (p *memPart) NextData(off int64) (int64, error) { return off, nil }

// Avail does not bound the part further: its limit does.
func (p *memPart) Avail() (int64, error) { return math.MaxInt64, nil }

func (p *memPart) Close() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.mem == nil {
		return errClosed
	}
	mem := p.mem
	p.mem = nil
	return unix.Munmap(mem)
}
