// The set file: which devices and parts of the snapstore there are, for a daemon
// that starts after this one was killed or upgraded. It is in the run directory and
// goes with the machine's next start; what is set up for good is on the command
// line or in the configuration file.

package control

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/google/uuid"

	"blksnap/store"
)

// members is the content of the set file.
type members struct {
	Boot    string          `json:"boot"`
	Devices []DeviceRequest `json:"devices"`
	Parts   []memberPart    `json:"parts"`
}

// memberPart is a part of the snapstore and the number that slots name it by.
type memberPart struct {
	No   uint8     `json:"no"`
	Spec string    `json:"spec"`
	ID   uuid.UUID `json:"id"`
}

func membersPath(run string) string { return filepath.Join(run, "set.json") }

// readMembers returns what a predecessor in this boot left in the run directory;
// nothing where there is none, or it cannot be read.
func readMembers(run, boot string) (members, error) {
	b, err := os.ReadFile(membersPath(run))
	if errors.Is(err, fs.ErrNotExist) {
		return members{}, nil
	}
	if err != nil {
		return members{}, err
	}
	var m members
	if err := json.Unmarshal(b, &m); err != nil {
		return members{}, fmt.Errorf("read %s: %w", membersPath(run), err)
	}
	if m.Boot != boot {
		return members{}, nil
	}
	return m, nil
}

// write puts m in the place of what is there, at once.
func (m members) write(run string) error {
	b, err := json.MarshalIndent(m, "", "  ")
	if err != nil {
		return err
	}
	path := membersPath(run)
	if err := os.WriteFile(path+".new", append(b, '\n'), 0o600); err != nil {
		return err
	}
	return os.Rename(path+".new", path)
}

// join adds the devices of m that nobody asks for, which were added while the
// predecessor ran.
func (m members) join(asked []DeviceRequest) []DeviceRequest {
	all := slices.Clone(asked)
	for _, q := range m.Devices {
		taken := func(o DeviceRequest) bool { return o.Name == q.Name || o.Origin == q.Origin }
		if !slices.ContainsFunc(asked, taken) {
			all = append(all, q)
		}
	}
	return all
}

// number is the number for a part that was just opened: the one that it had, else
// one that no part had. Slots of a part that is gone must not be looked for in
// another.
func (m members) number(part store.Part) (uint8, error) {
	t := part.Traits()
	taken := make(map[uint8]bool)
	for _, p := range m.Parts {
		if p.Spec == place(t.Spec) && p.ID == t.ID {
			return p.No, nil
		}
		taken[p.No] = true
	}
	for no := uint8(1); no != 0; no++ {
		if !taken[no] {
			return no, nil
		}
	}
	return 0, errors.New("the snapstore has had 255 parts since the machine started")
}

// place names a part without its limit, which may change.
func place(spec store.Spec) string {
	spec.Limit = 0
	return spec.String()
}

// note keeps the number of a part, also when the part is gone one day.
func (m *members) note(no uint8, part store.Part) {
	t := part.Traits()
	m.Parts = slices.DeleteFunc(m.Parts, func(p memberPart) bool { return p.No == no })
	m.Parts = append(m.Parts, memberPart{no, place(t.Spec), t.ID})
}

// keepMembers writes the set file now, and whenever a device comes or goes.
func (d *Daemon) keepMembers(run string, m members) {
	d.mu.Lock()
	d.run, d.members = run, m
	d.mu.Unlock()
	d.writeMembers()
}

// writeMembers writes the set file. That it cannot be written costs a successor
// the devices that were added at run time, no more.
func (d *Daemon) writeMembers() {
	d.writing.Lock()
	defer d.writing.Unlock()
	d.mu.Lock()
	run, m := d.run, d.members
	m.Boot, m.Devices = d.cat.Boot(), nil
	for _, dev := range d.devices {
		m.Devices = append(m.Devices, dev.request)
	}
	d.mu.Unlock()
	if run == "" {
		return
	}
	slices.SortFunc(m.Devices, func(a, b DeviceRequest) int { return strings.Compare(a.Name, b.Name) })
	if err := m.write(run); err != nil {
		d.log.Warn("devices added at run time will not be back after a restart", "err", err)
	}
}
