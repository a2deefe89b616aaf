// Telling whether an origin is still the one that we left, with the content that
// we left.
//
// A file is known by its device and inode numbers, its size, and its change time:
// every write by anybody stamps it. Our own writes do, too, so while we run a lease
// says until when they may; a stamp beyond the lease is somebody else's. A block
// device has no stamp. In the same boot its sequence number tells whether it is the
// same disk, and what the kernel counts whether it was written (written.go); over a
// reboot it is trusted only after a clean end, and if what file systems write when they
// are mounted is as it was.

package cow

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// identity is what is noted of an origin.
type identity struct {
	dev, ino uint64 // of the file; of a block device its number and 0
	size     int64
	changed  int64 // change time in nanoseconds since 1970; 0 for a block device
	diskSeq  uint64
	print    [sha256.Size]byte // of a block device's first and last MiB
}

// identify notes what f is. The fingerprint is taken only where it is asked for.
func identify(f *os.File, size int64, fingerprint bool) (identity, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return identity{}, err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFBLK {
		return identity{dev: st.Dev, ino: st.Ino, size: size, changed: st.Ctim.Nano()}, nil
	}
	id := identity{dev: st.Rdev, size: size}
	if seq, err := unix.IoctlGetInt(int(f.Fd()), unix.BLKGETDISKSEQ); err == nil {
		id.diskSeq = uint64(seq)
	}
	if !fingerprint {
		return id, nil
	}
	const part = 1 << 20
	h := sha256.New()
	for _, off := range []int64{0, max(0, size-part)} {
		if _, err := io.Copy(h, io.NewSectionReader(f, off, min(part, size))); err != nil {
			return identity{}, err
		}
	}
	h.Sum(id.print[:0])
	return id, nil
}

func (id identity) isFile() bool { return id.ino != 0 }

// foreign returns why the content of an origin that is now cannot be what we left
// when it was id, with our own writes leaving no stamp after lease. sameBoot says
// that the machine was not started anew since, clean that we ended in order.
func (id identity) foreign(now identity, lease time.Time, sameBoot, clean bool) error {
	switch {
	case id.isFile() != now.isFile():
		return errors.New("the origin was replaced")
	case id.size != now.size:
		return fmt.Errorf("the origin's size was changed from %d to %d bytes behind our back", id.size, now.size)
	case id.isFile() && (id.ino != now.ino || sameBoot && id.dev != now.dev):
		// Numbers of devices may change at a reboot.
		return errors.New("the origin was replaced by another file")
	case id.isFile() && now.changed > lease.UnixNano():
		return fmt.Errorf("the origin was written or changed behind our back, at %s", time.Unix(0, now.changed).UTC().Format(time.RFC3339Nano))
	case id.isFile() && now.changed < id.changed:
		return errors.New("the origin was restored to an earlier state behind our back")
	case !id.isFile() && sameBoot && (id.dev != now.dev || id.diskSeq != now.diskSeq):
		return errors.New("the origin is another disk, or was attached anew")
	case !id.isFile() && !sameBoot && !clean:
		return errors.New("a block device after a reboot without a clean end: nobody knows who wrote to it")
	case !id.isFile() && clean && id.print != now.print:
		return errors.New("the origin was written behind our back")
	}
	return nil
}

// The lease file in the run directory tells the next start who the origin was:
//
//	offset  size  field
//	     0   512  a checkpoint's header, for its identity
//	   512     8  lease, nanoseconds since 1970; changes
//	   520     8  size after the origin was resized, 0 where it was not; changes
//	   528     8  size that the origin is being cut to, 0 where it is not; changes
//	   536     8  length of the other name that the origin was served under since, 0 where
//	              it was not (othername.go); changes
//	   544    64  that name
//	   608     8  1 after a clean end: then the lease is the origin's change time, and nobody
//	              of ours has changed it since; changes
//	   616     8  one more than how many sectors were ever written to a block device, 0 where
//	              that is not known (written.go); changes
//	   624     8  the origin's change time after the last snapshot was taken, 0 where none
//	              was since the start; changes
//	   632     8  length of why the generation began, 0 where that is not known; changes
//	   640   512  that reason
//	  1152     8  when the machine was started, by the clock as it was set when the origin's
//	              change time was noted, 0 where that is not known; changes
//	  1160    16  the generation whose reason it is; changes
//	  1176     8  1 while the state directory may hold a map or a record that does not know of
//	              all writes (nostate.go); changes
const (
	leaseAt      = checkpointHeader
	resizedAt    = leaseAt + 8
	cutToAt      = resizedAt + 8
	otherAt      = cutToAt + 8
	otherNameAt  = otherAt + 8
	leftAt       = otherNameAt + maxName
	writtenAt    = leftAt + 8
	stampAt      = writtenAt + 8
	reasonAt     = stampAt + 8
	reasonTextAt = reasonAt + 8
	maxReason    = 512
	clockAt      = reasonTextAt + maxReason
	reasonOfAt   = clockAt + 8
	behindAt     = reasonOfAt + 16

	// clockSlack is by how much two looks at the clock may differ.
	clockSlack = 50 * time.Millisecond
)

// openLease maps the device's lease file, and returns the identity and the lease
// that a predecessor left; errBlank where there is none. mem is nil where it cannot be
// mapped; ErrDamaged says that another file may be in its place.
func (d *Device) openLease() (mem *memory, was identity, lease time.Time, err error) {
	path := d.path("lease")
	switch st, err := os.Lstat(path); {
	case err != nil: // said by who opens it
	case !st.Mode().IsRegular():
		return nil, was, lease, fmt.Errorf("%w: lease: it is not a regular file", ErrDamaged)
	case st.Size()%memoryStep != 0:
		// To be mapped it is made longer, with zeroes, which say that nobody else had
		// the origin, and that nobody counts what is written to it.
		return nil, was, lease, fmt.Errorf("%w: lease: it is cut short, to %d bytes", ErrDamaged, st.Size())
	}
	mem, err = memoryAt(path, memoryStep)
	if err != nil {
		return nil, was, lease, err
	}
	if mem.Len() == 0 {
		if err := mem.Grow(memoryStep); err != nil {
			mem.Close()
			return nil, was, lease, err
		}
	}
	b := mem.Bytes()[:checkpointHeader]
	if host.Uint64(b) == 0 {
		return mem, was, lease, errBlank
	}
	info, err := decodeCheckpoint(b)
	if err != nil {
		err = fmt.Errorf("lease: %w", err)
	}
	was = info.origin
	if size := wordAt(mem.Bytes(), resizedAt).Load(); size != 0 {
		was.size = int64(size)
	}
	if size := int64(wordAt(mem.Bytes(), cutToAt).Load()); size != 0 && size == d.Size() {
		was.size = size // by the predecessor, in its last moment
	}
	lease = time.Unix(0, int64(wordAt(mem.Bytes(), leaseAt).Load()))
	if stamp := wordAt(mem.Bytes(), stampAt).Load(); stamp != 0 {
		was.changed = int64(stamp)
	}
	if booted := int64(wordAt(mem.Bytes(), clockAt).Load()); booted != 0 && bootTime() < booted-int64(clockSlack) {
		was.changed = 0 // the clock was set back: our own stamps may look older
	}
	if was.isFile() && wordAt(mem.Bytes(), leftAt).Load() != 0 {
		was.changed = lease.UnixNano() // whatever the clock did since
	}
	return mem, was, lease, err
}

// servedAs returns why the content cannot be what we left, if the lease file says that
// the origin was served under another name.
func servedAs(mem *memory) error {
	b := mem.Bytes()
	n := wordAt(b, otherAt).Load()
	if n == 0 {
		return nil
	}
	return fmt.Errorf("the origin was served as device %q meanwhile", b[otherNameAt:][:min(n, maxName)])
}

// noteSize notes the origin's new size where a killed process leaves it.
func (d *Device) noteSize(size int64) {
	d.renewLease(time.Now().UnixNano())
	d.always(func() { wordAt(d.leaseMemory.Bytes(), resizedAt).Store(uint64(size)) })
	d.noteCut(0)
	d.cat.did("note a new size")
}

// noteCut notes that the origin is being cut to size; 0: that it is not.
func (d *Device) noteCut(size int64) {
	d.always(func() { wordAt(d.leaseMemory.Bytes(), cutToAt).Store(uint64(size)) })
}

// noteStamp notes how old the origin may look to the next start: not older than the
// newest snapshot. Somebody may bring the whole file system back to an earlier moment,
// with the stamp of that, which is within the lease. What was written between that
// moment and a snapshot is gone then, and neither the snapshot's images nor its number
// know it; what was written after the snapshot is marked, and preserved.
func (d *Device) noteStamp() {
	err := within(takeLimit, func() error {
		id, err := d.file.identify(false)
		if err == nil && id.isFile() {
			d.always(func() {
				wordAt(d.leaseMemory.Bytes(), clockAt).Store(uint64(bootTime()))
				wordAt(d.leaseMemory.Bytes(), stampAt).Store(uint64(id.changed))
			})
		}
		return err
	})
	if err != nil {
		d.cfg.Log.Warn("cannot note the origin's change time", "err", err)
	}
}

// beginLease writes who the origin is to mem, and lets the lease begin.
func (d *Device) beginLease(mem *memory) error {
	info, err := d.checkpointInfo(false)
	if err != nil {
		return err
	}
	var b [checkpointHeader]byte
	info.encode(b[:])
	copy(mem.Bytes(), b[:])
	wordAt(mem.Bytes(), resizedAt).Store(0)
	wordAt(mem.Bytes(), cutToAt).Store(0)
	wordAt(mem.Bytes(), otherAt).Store(0)
	wordAt(mem.Bytes(), leftAt).Store(0)
	wordAt(mem.Bytes(), writtenAt).Store(0)
	wordAt(mem.Bytes(), stampAt).Store(0)
	wordAt(mem.Bytes(), clockAt).Store(uint64(bootTime()))
	d.lease = (*atomic.Int64)(unsafe.Pointer(&mem.Bytes()[leaseAt]))
	d.lease.Store(max(d.lease.Load(), info.origin.changed))
	mem.closeWhenUnused()
	d.leaseMemory = mem
	d.noteBehind(d.stateDir != "" && d.durable.Load() == nil)
	return nil
}
