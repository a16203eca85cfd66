// SPDX-License-Identifier: Apache-2.0

// Holds CDI files to CDI's own package: its parser, its rules and the JSON schema in it. For each DIRECTORY=DEVICE it
// adds the device to an empty container as an engine does, and prints what that container then has.
package main

import (
	"encoding/json"
	"fmt"
	"os"
	"strings"

	oci "github.com/opencontainers/runtime-spec/specs-go"
	"tags.cncf.io/container-device-interface/pkg/cdi"
	"tags.cncf.io/container-device-interface/schema"
)

type answer struct {
	Problems   []string  `json:"problems"`
	Version    string    `json:"version"`
	Minimum    string    `json:"minimum"`
	Devices    []string  `json:"devices"`
	Container  *oci.Spec `json:"container"`
	Unresolved []string  `json:"unresolved"`
}

func main() {
	var told answer
	path := os.Args[1]
	if err := schema.BuiltinSchema().ValidateFile(path); err != nil {
		told.Problems = append(told.Problems, "schema: "+err.Error())
	}
	spec, err := cdi.ReadSpec(path, 0)
	if err != nil {
		told.Problems = append(told.Problems, err.Error())
	} else {
		told.Version = spec.Version
		told.Minimum, _ = cdi.MinimumRequiredVersion(spec.Spec)
		for _, device := range spec.Devices {
			told.Devices = append(told.Devices, spec.Kind+"="+device.Name)
		}
	}
	if len(os.Args) > 2 {
		directory := path[:strings.LastIndex(path, "/")]
		cache, _ := cdi.NewCache(cdi.WithSpecDirs(directory), cdi.WithAutoRefresh(false))
		told.Container = &oci.Spec{Process: &oci.Process{}}
		told.Unresolved, err = cache.InjectDevices(told.Container, os.Args[2:]...)
		if err != nil {
			told.Problems = append(told.Problems, err.Error())
		}
	}
	text, err := json.Marshal(told)
	if err != nil {
		panic(err)
	}
	fmt.Println(string(text))
}
