// Telling whether somebody else wrote to a block device.
//
// A block device has no change time, but the kernel counts the sectors that are written
// to each and discarded, whoever does. So while nobody of ours writes, and all that we
// wrote is on the disk, that number is in the lease file: another one at the next start
// is somebody else's doing. With the first write it goes, and it is back
//
//   - after a clean end,
//   - tallyAfter after the lease has run out, when what clients did not flush is flushed.
//
// A process that is killed in between leaves none. Then what was still in memory is
// written when its files are closed, and nobody can tell whose it was: the device's
// history goes on, as that of a file does whose lease runs.
//
// Not counted is what reaches the disk in another way: on another machine, through the
// file that backs a loop device, through the whole disk where the origin is a partition.

package cow

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// tallyAfter is how long after the end of the lease it is until the disk is asked to
// write everything: by then it mostly has.
const tallyAfter = 4 * time.Second

// tallyAgain is how long it is until the disk is asked once more, where it could not be
// done.
const tallyAgain = time.Minute

// written is how many sectors were ever written to a block device, or discarded; false
// where nobody counts.
func (f *hostFile) written() (sectors uint64, ok bool) {
	var st unix.Stat_t
	if !f.block || f.use(func(fd int) error { return unix.Fstat(fd, &st) }) != nil {
		return 0, false
	}
	dir := fmt.Sprintf("/sys/dev/block/%d:%d", unix.Major(st.Rdev), unix.Minor(st.Rdev))
	for _, queue := range []string{"/queue", "/../queue"} { // the second of a partition
		if b, err := os.ReadFile(dir + queue + "/iostats"); err == nil && string(b) == "0\n" {
			return 0, false
		}
	}
	b, err := os.ReadFile(dir + "/stat")
	if err != nil {
		return 0, false
	}
	return sectorsIn(string(b))
}

// sectorsIn finds the numbers in a block device's statistics (Linux,
// Documentation/block/stat.rst). Requests are counted after whoever waits for them was
// woken up, sectors before.
func sectorsIn(stat string) (sectors uint64, ok bool) {
	const written, discarded = 6, 13
	fields := strings.Fields(stat)
	if len(fields) <= written {
		return 0, false
	}
	for _, k := range []int{written, discarded} {
		if k >= len(fields) { // before Linux 4.18
			break
		}
		n, err := strconv.ParseUint(fields[k], 10, 64)
		if err != nil {
			return 0, false
		}
		sectors += n
	}
	return sectors, true
}

// countWritten has the disk write everything, and returns what is noted in the lease file
// then: one more than how many sectors were written to it, or 0 where that is not known.
func (d *Device) countWritten() uint64 {
	if _, ok := d.file.written(); !ok {
		return 0
	}
	if within(d.cfg.PreserveLimit, func() error { return d.flush(false) }) != nil {
		return 0
	}
	n, ok := d.file.written()
	if !ok {
		return 0
	}
	return n + 1
}

// writtenSince returns why the content cannot be what we left, where mem says how many
// sectors had been written by then.
func (d *Device) writtenSince(mem *memory) error {
	noted := wordAt(mem.Bytes(), writtenAt).Load()
	if noted == 0 {
		return nil
	}
	now := d.countWritten()
	if now == 0 {
		// Where the disk takes its time, perhaps because it was spun down, what it has
		// counted until now must do: snapshots are not given up for that.
		n, ok := d.file.written()
		if !ok {
			return errors.New("nobody counts any more what is written to the origin")
		}
		now = n + 1
	}
	// A count that is less began anew with the same disk, as that of a partition does when
	// the partition table is read again: it says nothing.
	if now > noted {
		return fmt.Errorf("the origin was written behind our back: %d sectors", now-noted)
	}
	return nil
}

// noteWritten notes n, which countWritten has returned when the lease ended at until,
// unless somebody of ours came to write since.
func (d *Device) noteWritten(n uint64, until int64) {
	d.leasing.Lock()
	defer d.leasing.Unlock()
	if d.left || d.leased.Load() != until || d.writers.occupied() || d.stamping.Load() > 0 {
		return
	}
	d.always(func() { wordAt(d.leaseMemory.Bytes(), writtenAt).Store(n) })
	d.counted.Store(true)
	d.leased.Store(0) // so that the next write renews the lease, whatever the clock does
}

// tallyLater has tendLease called once more, unless a write has renewed the lease, which
// ended at until, and so sees to it earlier.
func (d *Device) tallyLater(until int64) {
	d.leasing.Lock()
	defer d.leasing.Unlock()
	if d.leased.Load() == until {
		d.leaseTimer.Reset(tallyAgain)
	}
}

// tally counts what was written after a while without writes.
func (d *Device) tally() {
	until := d.leased.Load()
	if n := d.countWritten(); n != 0 {
		d.noteWritten(n, until)
	}
}
