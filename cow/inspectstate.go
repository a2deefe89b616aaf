// Verifying what is kept for the time after a reboot.

package cow

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"path/filepath"
	"time"
)

// stateDevice verifies what a device keeps for the time after a reboot.
func (w *inspector) stateDevice(_, dir string) {
	path := filepath.Join(dir, "map")
	info, err := inspectCheckpoint(path)
	if err != nil {
		w.tell(path, adviceGeneration, "%v", err)
	}
	regions := filepath.Join(dir, "regions")
	st, err := inspectRegions(regions)
	if err != nil {
		w.tell(regions, adviceGeneration, "%v", err)
	}
	if info != nil && st != nil && (info.generation != st.generation || info.origin.size != st.size) {
		w.tell(regions, adviceGeneration, "it does not belong to the map beside it: another generation or size")
	}
	if st != nil {
		w.lease(regions, st.lease, stateLease)
	}
	path = filepath.Join(dir, "rollback")
	f := w.open(path, "remove it once the device's content is known to be good")
	if f == nil {
		return
	}
	defer f.Close()
	b := make([]byte, tearBytes+1)
	n, err := f.ReadAt(b, 0)
	if err != nil && err != io.EOF {
		w.tell(path, "see to it that it can be read", "%v", cause(err))
	} else if _, err := decodeTear(b[:n]); err != nil {
		w.tell(path, "roll the device back to an older snapshot, or restore it, then remove and add it", "%v", err)
	}
}

// lease tells of one that hides what others write to an origin.
func (w *inspector) lease(path string, until int64, most time.Duration) {
	if left := time.Until(time.Unix(0, until)); left > most+time.Hour {
		w.tell(path, "set the clock, then start and stop the daemon",
			"its lease ends in %v: until then nobody notices writes behind our back", left.Round(time.Second))
	}
}

// inspectCheckpoint verifies the checkpoint at path; nil where there is none.
func inspectCheckpoint(path string) (*checkpointInfo, error) {
	f, err := openInspected(path)
	if f == nil {
		return nil, err
	}
	defer f.Close()
	b, err := f.head(checkpointHeader)
	if err != nil {
		return nil, err
	}
	info, err := decodeCheckpoint(b)
	if err != nil {
		return nil, err
	}
	return &info, info.inspectBody(f)
}

// inspectBody verifies the map that follows the header.
func (c checkpointInfo) inspectBody(f *inspectedFile) error {
	if c.length != f.size-checkpointHeader {
		return fmt.Errorf("%w: checkpoint: a map of %d bytes, not %d", ErrDamaged, f.size-checkpointHeader, c.length)
	}
	sum := crc32.New(crcTable)
	r := bufio.NewReaderSize(io.TeeReader(io.NewSectionReader(f, checkpointHeader, c.length), sum), 1<<20)
	for next := int64(0); ; {
		var head [16]byte
		if _, err := io.ReadFull(r, head[:]); err == io.EOF {
			break
		} else if err != nil {
			return fmt.Errorf("%w: checkpoint: %w", ErrDamaged, err)
		}
		block, n := int64(binary.LittleEndian.Uint64(head[:])), int64(binary.LittleEndian.Uint64(head[8:]))
		if c.block <= 0 || n <= 0 || n > 64<<10 || block < next || block > (c.origin.size-1)/c.block+1-n {
			return fmt.Errorf("%w: checkpoint: %d blocks from %d on", ErrDamaged, n, block)
		}
		if _, err := r.Discard(int(n)); err != nil {
			return fmt.Errorf("%w: checkpoint: %w", ErrDamaged, err)
		}
		next = block + n
	}
	if sum.Sum32() != c.sum {
		return fmt.Errorf("%w: checkpoint: checksum of the map", ErrDamaged)
	}
	return nil
}

// inspectRegions verifies the record of regions at path; nil where there is none.
func inspectRegions(path string) (*regionsState, error) {
	f, err := openInspected(path)
	if f == nil {
		return nil, err
	}
	defer f.Close()
	st, sure, err := readHeaders(readOnly{f.File})
	if err != nil {
		return nil, err
	}
	r := &regions{n: regionsOf(st.size)}
	if want := regionsSets + 2*r.setBytes(); f.size < want {
		return nil, fmt.Errorf("%w: record of regions: %d bytes, not %d", ErrDamaged, f.size, want)
	}
	if !sure {
		return &st, fmt.Errorf("%w: record of regions: one of its headers", ErrDamaged)
	}
	var b [regionPage]byte
	for p := range r.pages() {
		if _, err := f.ReadAt(b[:], r.pageAt(st.set, p)); err != nil {
			return &st, cause(err)
		}
		if binary.LittleEndian.Uint32(b[508:]) != crc32.Checksum(b[:508], crcTable) {
			return &st, fmt.Errorf("%w: record of regions: checksum of page %d", ErrDamaged, p)
		}
	}
	return &st, nil
}

// readOnly is a file that is only read, for those who want a durableFile.
type readOnly struct{ *os.File }

func (readOnly) WriteAt([]byte, int64) (int, error) { return 0, os.ErrPermission }
func (readOnly) Sync() error                        { return os.ErrPermission }
