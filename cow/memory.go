// Memory that grows without moving: tables, change maps and the catalogue live in
// it.

package cow

import (
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// memory is a run of bytes, zero when new, that only grows and never moves, so
// that it can be read without a lock while it grows. Address space is reserved for
// all of it at once, which costs nothing; bytes are allocated as it grows, by
// system calls and before they are touched: when there is no memory or no space,
// Grow says so, instead of the process being killed at some later store.
//
// Over a file it is the file's content, for every process that maps it: what was
// stored is there when the process is killed at the next instruction.
type memory struct {
	reserved []byte
	n        atomic.Int64 // allocated bytes
	file     *os.File     // nil: anonymous

	// lost is set when it faulted: what it holds is not in the file any more, and it
	// grows without it. replaced is how many bytes cannot fault any more; protected
	// by the user's lock (mapfault.go).
	lost     atomic.Bool
	replaced int64
}

// memoryStep is the unit in which memory grows.
const memoryStep = 64 << 10

// newMemory reserves address space for at least max bytes of anonymous memory.
func newMemory(max int64) (*memory, error) {
	max = roundUp(max, memoryStep)
	b, err := unix.Mmap(-1, 0, int(max), unix.PROT_NONE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE)
	if err != nil {
		return nil, fmt.Errorf("reserve %d bytes of address space: %w", max, err)
	}
	return &memory{reserved: b}, nil
}

// mapFile maps the file at path, which it creates if it does not exist, with
// address space for at least max bytes.
func mapFile(path string, max int64) (*memory, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		f.Close()
		return nil, err
	}
	// What a killed process had allocated and not yet mapped counts, too.
	size = roundUp(size, memoryStep)
	m, err := newMemory(max + size)
	if err != nil {
		f.Close()
		return nil, err
	}
	m.file = f
	m.mapped()
	if size > 0 {
		if err := m.Grow(size); err != nil {
			m.Close()
			return nil, err
		}
	}
	return m, nil
}

// memoryAt is mapFile, or newMemory where path is empty.
func memoryAt(path string, max int64) (*memory, error) {
	if path == "" {
		return newMemory(max)
	}
	return mapFile(path, max)
}

// Bytes is all that was reserved; only the first Len bytes may be touched.
func (m *memory) Bytes() []byte { return m.reserved }

// Len is how many bytes may be touched.
func (m *memory) Len() int64 { return m.n.Load() }

// what it is, for who is told that it cannot grow.
func (m *memory) what() string {
	if m.file == nil {
		return "tables"
	}
	return m.file.Name()
}

// Grow allocates at least n more bytes. One caller at a time.
func (m *memory) Grow(n int64) error {
	from := m.n.Load()
	to := from + roundUp(n, memoryStep)
	if to > int64(len(m.reserved)) {
		return fmt.Errorf("grow %s to %d bytes: %w", m.what(), to, unix.ENOSPC)
	}
	lost := m.lost.Load()
	err := m.back(from, to)
	if err == nil {
		err = populate(m.reserved[from:to])
	}
	if err == nil {
		m.n.Store(to)
	}
	// It may have been given up meanwhile. First longer, then a look: replace does it the
	// other way round, so one of the two puts memory behind these bytes that is no file's.
	if !lost && m.lost.Load() {
		err = m.backLost(from, to)
	}
	if err != nil {
		m.n.Store(from)
		return fmt.Errorf("grow %s to %d bytes: %w", m.what(), to, err)
	}
	m.n.Store(to)
	return nil
}

// populate has the kernel allocate the bytes of b.
func populate(b []byte) error {
	// Older kernels do not know the advice; the first touch allocates then.
	if err := unix.Madvise(b, unix.MADV_POPULATE_WRITE); err != nil && err != unix.EINVAL {
		return err
	}
	return nil
}

// backLost puts anonymous memory behind [from, to) of what was given up, and takes back
// what the file may have got for it: a start must find it empty.
func (m *memory) backLost(from, to int64) error {
	if err := m.file.Truncate(0); err != nil {
		return err
	}
	if err := m.backAnonymous(from, to); err != nil {
		return err
	}
	return populate(m.reserved[from:to])
}

// backAnonymous puts zeroes that cannot fault behind [from, to).
func (m *memory) backAnonymous(from, to int64) error {
	_, err := unix.MmapPtr(-1, 0, unsafe.Pointer(&m.reserved[from]), uintptr(to-from),
		unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_FIXED)
	return err
}

// back puts something behind the reserved addresses [from, to).
func (m *memory) back(from, to int64) error {
	if m.file == nil || m.lost.Load() {
		return unix.Mprotect(m.reserved[from:to], unix.PROT_READ|unix.PROT_WRITE)
	}
	// A hole in the file would be filled at the first touch, or kill us then.
	fill := func() error { return unix.Fallocate(int(m.file.Fd()), 0, from, to-from) }
	if err := retry(fill); err != nil {
		if !errors.Is(err, unix.EOPNOTSUPP) {
			return err
		}
		if err := fillFile(m.file, from, to); err != nil {
			return err
		}
	}
	// (unix.Mmap would choose the address.)
	_, err := unix.MmapPtr(int(m.file.Fd()), from, unsafe.Pointer(&m.reserved[from]), uintptr(to-from),
		unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_FIXED)
	return err
}

// retry calls fn again where a signal interrupts it. The runtime sends itself many,
// and on tmpfs fallocate gives up at the first (before Linux 6.10).
func retry(fn func() error) error {
	for {
		if err := fn(); err != unix.EINTR {
			return err
		}
	}
}

// fillFile is fallocate for file systems without it: what was never written is
// written.
func fillFile(f *os.File, from, to int64) error {
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return err
	}
	for from = max(from, size); from < to; {
		n, err := f.WriteAt(zeroes[:min(to-from, int64(len(zeroes)))], from)
		if err != nil {
			return err
		}
		from += int64(n)
	}
	return nil
}

// Close gives address space and anonymous memory back; a file stays. Nothing may
// look at the bytes any more.
func (m *memory) Close() error {
	b, f := m.reserved, m.file
	m.reserved, m.file = nil, nil
	m.n.Store(0)
	if b == nil {
		return nil
	}
	unmapped(b)
	err := unix.Munmap(b)
	if f != nil {
		err = errors.Join(err, f.Close())
	}
	return err
}

// closeWhenUnused is Close as soon as m is unreachable.
func (m *memory) closeWhenUnused() {
	f := m.file
	runtime.AddCleanup(m, func(b []byte) {
		unmapped(b)
		unix.Munmap(b)
		if f != nil {
			f.Close()
		}
	}, m.reserved)
}

// roundUp is n or the next multiple of unit, a power of two.
func roundUp(n, unit int64) int64 { return (n + unit - 1) &^ (unit - 1) }
